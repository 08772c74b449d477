"""Where tokens stand, what fires on them, and the numbers that are drawn for them."""

import pytest
import torch

from sae_persona.errors import DataError
from sae_persona.features.firings import POSITION_BITS, Firings, Piece, TokenRows, chance, changes, lexsort


def test_firings_are_the_entries_sorted_by_latent_then_place(make_corpus):
    made = make_corpus(0)
    found = made.firings
    split = zip(
        found.latent.tolist(),
        (found.place >> POSITION_BITS).tolist(),
        (found.place & ((1 << POSITION_BITS) - 1)).tolist(),
        found.acts.tolist(),
        strict=True,
    )
    assert list(split) == sorted(entry[:4] for entry in made.entries())


def test_parts_are_whole_sequences_of_at_most_so_many_rows(make_corpus):
    made = make_corpus(1)
    whole, seen = made.rows, 0
    for most in (1, 50, 10_000):
        seen = 0
        for rows, part in whole.parts(most):
            assert rows.start == seen and part.n == rows.stop - rows.start
            assert part.n <= most or len(part.document) == 1
            assert torch.equal(part.place, whole.place[rows])
            assert torch.equal(part.ids[part.at], whole.ids[whole.at[rows]])
            assert part.starts[0] == 0 and part.starts[-1] == len(part.ids)
            seen = rows.stop
        assert seen == whole.n
    assert list(TokenRows.of([]).parts(5)) == []


def test_chance_is_uniform_and_the_same_number_for_the_same_firing():
    place, latent = torch.arange(4000).repeat_interleave(5), torch.arange(5).repeat(4000)
    drawn = chance(place, latent)
    assert len(drawn.unique()) == len(drawn) and drawn.min() >= 0
    shares = torch.histc(drawn.double() / 2**63, 10, 0, 1) / len(drawn)
    assert (shares - 0.1).abs().max() < 4 * (0.09 / len(drawn)) ** 0.5
    assert torch.equal(chance(place[7:9], latent[7:9]), drawn[7:9])
    # splitmix64 with seed 0 begins with this number, by its authors' C code
    assert int(chance(torch.tensor([0]), -1)[0]) == 0xE220A8397B1DCDAF & (2**63 - 1)


def test_lexsort_and_changes():
    first, second = torch.tensor([2, 1, 1, 2, 1]), torch.tensor([5, 9, 3, 5, 3])
    order = lexsort(first, second)
    assert order.tolist() == [2, 4, 1, 0, 3]
    assert changes(first[order], second[order]).tolist() == [True, False, True, True, False]
    assert changes(first[:0]).tolist() == []


def test_refuses_latents_of_other_tokens_and_endless_texts(make_corpus):
    made = make_corpus(2)
    with pytest.raises(DataError, match=r"need latents of as many"):
        Firings.of(made.part(1).rows, made.latents, 6)
    with pytest.raises(DataError, match="split it"):
        TokenRows.of([Piece(0, 2**POSITION_BITS, [1], torch.ones(1, dtype=torch.bool))])
