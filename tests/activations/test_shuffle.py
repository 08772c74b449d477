import json

import pytest
import torch

from sae_persona.activations.sequences import Place
from sae_persona.activations.shuffle import Chunk, Shuffle, Sizes
from sae_persona.errors import ConfigError
from sae_persona.types import State

ROWS = torch.arange(100.0)[:, None].expand(-1, 2)


def shuffled(chunks, *, buffer_tokens=32, batch_tokens=8, seed=0):
    """Batches of rows that come in these chunks; the place of a chunk is its number."""
    made = [Chunk(Place(0, i), Place(0, i + 1), {"x": rows}) for i, rows in enumerate(chunks)]
    sizes = Sizes(buffer_tokens=buffer_tokens, batch_tokens=batch_tokens)
    return Shuffle(lambda place: iter(made[place.text :]), sizes, seed=seed)


def served(chunks, **changes):
    return [batch["x"][:, 0].int().tolist() for batch in shuffled(chunks, **changes)]


def test_every_row_once_but_for_the_last_partial_batch():
    batches = served(ROWS.split(7))
    rows = [row for batch in batches for row in batch]
    assert [len(batch) for batch in batches] == [8] * 12
    assert len(set(rows)) == 96
    assert set(rows) <= set(range(100))


def test_the_seed_decides_and_the_cutting_does_not():
    assert served(ROWS.split(7)) == served(ROWS.split(7))
    assert served(ROWS.split(7)) == served(ROWS.split(100)) == served(ROWS.split(1))
    assert served(ROWS.split(7)) != served(ROWS.split(7), seed=1)


def test_rows_mix_across_the_buffer():
    """A batch of neighbours would span 8; half a buffer is kept, so that rows of unlike age meet."""
    batches = served(ROWS.split(7))
    assert all(max(batch) - min(batch) > 12 for batch in batches)
    assert min(batches[2]) < 32 <= max(batches[2])  # rows of the first filling and of the second


def test_short_streams():
    assert [sorted(batch) for batch in served([ROWS[:3]])] == [[0, 1, 2]]
    assert len(served([ROWS[:11]])) == 1
    assert served([]) == served([ROWS[:0]]) == []


def test_a_buffer_of_one_batch():
    assert [len(batch) for batch in served(ROWS.split(7), buffer_tokens=8)] == [8] * 12


def test_batches_do_not_share_memory():
    first, *_ = batches = [batch["x"] for batch in shuffled([ROWS])]
    first.fill_(-1)
    assert all((batch >= 0).all() for batch in batches[1:])


def test_impossible_sizes():
    with pytest.raises(ConfigError, match="a buffer of 4 tokens cannot serve batches of 8"):
        served([ROWS], buffer_tokens=4)
    with pytest.raises(ConfigError, match="batches of 0"):
        served([ROWS], batch_tokens=0)


@pytest.mark.parametrize("cut", [1, 7, 100])
@pytest.mark.parametrize("n", [3, 100, 96])
def test_it_goes_on_from_any_place(n, cut):
    chunks = ROWS[:n].split(cut)
    whole = served(chunks)
    for done in range(len(whole) + 1):
        first = shuffled(chunks)
        got = [next(first)["x"][:, 0].int().tolist() for _ in range(done)]
        state = first.snapshot()
        kept = State({k: x.clone() for k, x in state.tensors.items()}, json.loads(json.dumps(state.numbers)))
        rest = shuffled(chunks).restore(kept)
        assert got + [batch["x"][:, 0].int().tolist() for batch in rest] == whole, done
        assert next(rest, None) is None


def test_rows_of_several_names_stay_together():
    chunk = Chunk(Place(), Place(1), {"a": ROWS, "b": -ROWS[:, :1]})
    batches = list(Shuffle(lambda place: iter([chunk][place.round :]), Sizes(32, 8), seed=0))
    assert batches and all(torch.equal(batch["a"][:, :1], -batch["b"]) for batch in batches)
