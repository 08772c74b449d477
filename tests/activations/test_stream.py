import json
from dataclasses import asdict

import pytest
import torch

from sae_persona.activations.dialogues import Dialogue, Tokens, tokenize
from sae_persona.activations.harvest import harvest
from sae_persona.activations.hooks import editing, read
from sae_persona.activations.lm import padded
from sae_persona.activations.sequences import kept, sequences
from sae_persona.activations.stream import StreamConfig, stream, streams
from sae_persona.activations.texts import read_texts
from sae_persona.errors import ConfigError, DataError, ModelError
from sae_persona.types import HookPoint, State

HOOK = HookPoint(1)
TEXTS = ["a", "", "some words", "more of them, in a longer text that does not fit", "the end"]
SMALL = StreamConfig(context_size=16, batch_tokens=8, buffer_tokens=32, lm_batch=2)
CHAT = Dialogue(({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ahoy"}))


def config(**changes):
    return StreamConfig(**{**asdict(SMALL), **changes})


def rows(tensors):
    """All rows as a sorted list, so that two sets of activations can be compared whatever their order."""
    return sorted(torch.cat(list(tensors)).tolist())


def by_hand(lm, texts, context_size):
    """Each piece alone through the model, without padding: what must come out, in any order."""
    found = []
    for text in texts:
        ids = lm.tokenizer(text, add_special_tokens=False).input_ids
        room = context_size - len(lm.prefix)
        for piece in (ids[at : at + room] for at in range(0, len(ids), room)):
            acts = read(lm, [HOOK], *padded(lm, [lm.prefix + piece]))[HOOK][0]
            found.append(acts[len(lm.prefix) :])
    return found


@pytest.mark.parametrize("bos", [True, False])
def test_every_token_once_and_never_bos_or_padding(make_lm, bos):
    lm = make_lm(bos=bos)
    want = rows(by_hand(lm, TEXTS, 16))
    n = len("".join(TEXTS))
    got = rows(stream(lm, HOOK, TEXTS, config(batch_tokens=n, buffer_tokens=n)))
    assert len(got) == len(want) == n
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=0, atol=1e-5)


def test_batches_have_one_shape_and_come_again(lm):
    batches = stream(lm, HOOK, TEXTS, SMALL)
    first = list(batches)
    assert {(tuple(batch.shape), batch.dtype) for batch in first} == {((8, 16), torch.float32)}
    assert batches.d_in == 16
    for again in (batches, stream(lm, HOOK, iter(TEXTS), SMALL)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = list(stream(lm, HOOK, TEXTS, config(seed=1)))
    assert not torch.equal(first[0], other[0])


def test_two_iterations_do_not_disturb_each_other(lm):
    batches = stream(lm, HOOK, TEXTS, SMALL)
    alone = list(batches)
    for (a, b), c in zip(zip(batches, batches, strict=True), alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_passes_go_over_the_texts_again(lm):
    once, twice = (stream(lm, HOOK, TEXTS, config(passes=p, batch_tokens=1)) for p in (1, 2))
    assert len(list(twice)) == 2 * len(list(once)) == 2 * len("".join(TEXTS))


def test_activations_stay_in_the_dtype_of_the_model(make_lm):
    lm = make_lm()
    lm.model.bfloat16()
    assert next(iter(stream(lm, HOOK, TEXTS, SMALL))).dtype == torch.bfloat16


def test_answers_only(lm):
    """The pre-answer token and the answer, nothing else."""
    tokens = tokenize(lm, CHAT)
    acts = read(lm, [HOOK], *padded(lm, [tokens.ids]))[HOOK][0]
    (answer,) = tokens.answers
    got = rows(stream(lm, HOOK, [CHAT, "a text"], config(tokens="answers", context_size=64)))
    want = rows([acts[answer.start - 1 : answer.stop]])
    assert len(got) == len("ahoy") + 1
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=0, atol=1e-5)


def test_bos_is_not_kept_even_before_an_answer(make_lm):
    lm = make_lm(template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    empty = Dialogue(({"role": "user", "content": ""}, {"role": "assistant", "content": "ahoy"}))
    tokens = tokenize(lm, empty)
    assert tokens.answers[0].pre == 0
    assert kept(lm, tokens, "answers").tolist() == [False, True, True, True, True]


def test_pieces_of_a_long_text_each_begin_with_bos(lm):
    pieces = [piece.ids for piece in sequences(lm, read_texts(["abcdefg"]), 4)]
    assert [ids[0] for ids in pieces] == [1, 1, 1]
    assert [lm.tokenizer.decode(ids[1:]) for ids in pieces] == ["abc", "def", "g"]


def test_harvest_keeps_the_order_and_bos(lm):
    tokens = [Tokens([1, *range(40, 40 + n)]) for n in (9, 0, 3, 7, 1) * 8]
    got = list(harvest(lm, HOOK, iter(tokens), 2))
    assert [one for one, _ in got] == tokens
    for one, acts in got[:5]:
        alone = read(lm, [HOOK], *padded(lm, [one.ids]))[HOOK][0]
        torch.testing.assert_close(acts, alone, rtol=0, atol=1e-5)


def test_harvest_takes_a_sequence_without_tokens(lm):
    shapes = [acts.shape for _, acts in harvest(lm, HOOK, [Tokens([]), Tokens([1, 40])], 1)]
    assert shapes == [(0, 16), (2, 16)]


def test_activations_that_are_not_finite(lm):
    lm.model.get_input_embeddings().weight.data[lm.tokenizer("b").input_ids[1]] = float("nan")
    with pytest.raises(
        DataError, match=r"layers.1.resid_post of tiny-Llama are not finite in '<s>a b': load .* float32"
    ):
        list(stream(lm, HOOK, ["a", "a b"], SMALL))


def test_what_padding_holds_does_not_matter(lm):
    def spoil(x):
        assert x.shape[:2] == (2, 3)
        return x.index_put((torch.tensor(0), torch.tensor(2)), torch.tensor(float("nan")))

    with editing(lm, HOOK, spoil):
        found = [acts for _, acts in harvest(lm, HOOK, [Tokens([1, 40]), Tokens([1, 40, 41])], 2)]
    assert all(acts.isfinite().all() for acts in found)


def test_texts_without_a_token(lm):
    with pytest.raises(DataError, match="none of the texts has a token"):
        list(stream(lm, HOOK, ["", ""], SMALL))
    with pytest.raises(DataError, match="none of the texts has an answer: tokens=answers needs dialogues"):
        list(stream(lm, HOOK, ["a text"], config(tokens="answers")))


def test_what_cannot_be_is_refused_before_anything_runs(lm):
    with pytest.raises(ModelError, match=r"layers.3.resid_post does not exist"):
        stream(lm, HookPoint(3), TEXTS, SMALL)
    with pytest.raises(ConfigError, match="context_size 65 is more than tiny-Llama takes: 64"):
        stream(lm, HOOK, TEXTS, config(context_size=65))
    with pytest.raises(DataError, match="no texts at"):
        stream(lm, HOOK, "absent.txt", SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_size": 1}, "context_size must be at least 2, got 1"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"lm_batch": 0}, "lm_batch must be at least 1"),
        ({"passes": 0}, "passes must be at least 1"),
        ({"buffer_tokens": 7}, "buffer_tokens must hold a batch of 8, got 7"),
        ({"tokens": "some"}, "tokens is one of all, answers, got 'some'"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_config_is_inert():
    assert StreamConfig(**asdict(SMALL)) == SMALL


@pytest.mark.parametrize("room", [0, 3, 10_000])
def test_held_activations_are_those_of_the_model(lm, room, monkeypatch):
    """Three passes give the same batches, with one run of the model if all fits and with three if it does not."""
    from sae_persona.activations import harvest as module

    calls = []
    monkeypatch.setattr(module, "read", lambda *args: calls.append(1) or read(*args))
    once = list(stream(lm, HOOK, TEXTS, config(passes=1)))
    per_pass = len(calls)
    calls.clear()
    plain = list(stream(lm, HOOK, TEXTS, config(passes=3)))
    calls.clear()
    held = list(stream(lm, HOOK, TEXTS, config(passes=3, hold_tokens=room)))
    assert len(calls) == per_pass * (1 if room == 10_000 else 3)
    assert len(held) == len(plain) > len(once)
    assert all(torch.equal(a, b) for a, b in zip(held, plain, strict=True))


@pytest.mark.parametrize("passes", [1, 3])
def test_the_number_of_batches_is_known_beforehand(lm, passes):
    made = stream(lm, HOOK, TEXTS, config(passes=passes))
    assert made.n_batches() == len(list(made))


@pytest.mark.parametrize("changes", [{}, {"passes": 2, "hold_tokens": 10_000}, {"passes": 2, "pack": True}], ids=str)
def test_a_stream_goes_on_from_any_place(lm, changes):
    texts = [text * 3 for text in TEXTS] * 4
    made = streams(lm, [HOOK, HookPoint(0)], texts, config(**changes))
    whole = list(made)
    for done in (0, 1, 5, len(whole) - 1, len(whole)):
        first = iter(made)
        for _ in range(done):
            next(first)
        state = first.snapshot()
        rest = list(made.resume(State(state.tensors, json.loads(json.dumps(state.numbers)))))
        assert len(rest) == len(whole) - done
        for a, b in zip(rest, whole[done:], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in ("layers.1.resid_post", "layers.0.resid_post"))


def test_several_hook_points_come_from_one_pass(lm, monkeypatch):
    from sae_persona.activations import harvest as module

    calls = []
    monkeypatch.setattr(module, "read", lambda *args: calls.append(1) or read(*args))
    hooks = [HookPoint(2, "resid_pre"), HookPoint(0)]
    alone = [list(stream(lm, hook, TEXTS, SMALL)) for hook in hooks]
    calls_alone = len(calls)
    calls.clear()
    both = list(streams(lm, hooks, TEXTS, SMALL))
    assert len(calls) == calls_alone / 2
    for hook, batches in zip(hooks, alone, strict=True):
        assert all(torch.equal(a[str(hook)], b) for a, b in zip(both, batches, strict=True))


def test_the_layer_where_it_began_is_named(lm):
    def spoil(x):
        return x.index_fill(1, torch.tensor(2), float("inf"))

    hooks = [HookPoint(2), HookPoint(0), HOOK]
    with editing(lm, HOOK, spoil), pytest.raises(DataError, match=r"at layers.1.resid_post .* not finite in '<s>some"):
        list(streams(lm, hooks, ["some words"], SMALL))


def test_packed_activations_are_those_of_rows_each(lm):
    plain, packed = (rows(stream(lm, HOOK, TEXTS, config(pack=on, batch_tokens=1))) for on in (False, True))
    torch.testing.assert_close(torch.tensor(plain), torch.tensor(packed), rtol=0, atol=1e-5)


def test_of_a_packed_row_that_one_sequence_spoils_that_one_is_named(lm):
    lm.model.get_input_embeddings().weight.data[lm.tokenizer("b").input_ids[1]] = float("nan")
    with pytest.raises(DataError, match=r"not finite in '<s>a b'"):
        list(stream(lm, HOOK, ["a", "a b", "c"], config(pack=True)))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_how_far_ahead_changes_nothing(lm, n):
    plain, other = (list(stream(lm, HOOK, TEXTS, config(ahead=k))) for k in (2, n))
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("changes", [{}, {"pack": False}, {"buffer_on_host": True}], ids=str)
def test_a_stream_on_a_gpu_goes_on_to_the_bit_and_is_that_of_a_cpu(make_lm, changes):
    lm, texts = make_lm(), [text * 3 for text in TEXTS] * 4
    on_cpu = rows(stream(lm, HOOK, texts, config(batch_tokens=1)))
    lm.model.to("cuda")
    on_gpu = rows(x.cpu() for x in stream(lm, HOOK, texts, config(batch_tokens=1, **changes)))
    torch.testing.assert_close(torch.tensor(on_gpu), torch.tensor(on_cpu), rtol=0, atol=1e-4)
    made = streams(lm, [HOOK], texts, config(**changes))
    whole = list(made)
    first = iter(made)
    for _ in range(5):
        next(first)
    rest = list(made.resume(first.snapshot()))
    assert all(torch.equal(a[str(HOOK)], b[str(HOOK)]) for a, b in zip(rest, whole[5:], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_activations_that_are_not_finite_are_named_on_a_gpu_too(lm):
    lm.model.get_input_embeddings().weight.data[lm.tokenizer("b").input_ids[1]] = float("nan")
    lm.model.to("cuda")
    with pytest.raises(DataError, match=r"layers.1.resid_post of tiny-Llama are not finite in '<s>a b'"):
        list(stream(lm, HOOK, ["a", "a b"], SMALL))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_other_ranks_go_on_from_the_earliest_text(lm, world):
    """Of a corpus that two ranks have read in part, ``world`` others read at least all that neither has come to."""
    texts = read_texts([f"text {chr(97 + i % 26)}{i:03}" for i in range(200)])
    shares = [streams(lm, [HOOK], texts.share(r, 2), config(buffer_tokens=16)) for r in range(2)]
    states = []
    for made, n in zip(shares, (20, 30), strict=True):
        first = iter(made)
        for _ in range(n):
            next(first)
        states.append(first.snapshot())
    earliest = min(state.numbers["place"][1] * 2 + r for r, state in enumerate(states))
    firsts = []
    for r in range(world):
        share = texts.share(r, world)
        joined = streams(lm, [HOOK], share, config(buffer_tokens=16)).join(states, r, world)
        place = joined._chunk.start
        firsts.append(place.text * world + r)
        assert next(joined)[str(HOOK)].shape == (8, 16)
    assert min(firsts) == earliest > 0 and max(firsts) < earliest + world
