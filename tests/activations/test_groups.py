"""Sequences in rows: none lost, none too long, and packed ones see only themselves."""

import pytest
import torch

from sae_persona.activations.dialogues import Tokens
from sae_persona.activations.groups import FORWARDS, Layout, groups, packed_rows
from sae_persona.activations.harvest import read_group
from sae_persona.activations.hooks import check_packing, read
from sae_persona.activations.lm import padded
from sae_persona.activations.sequences import Place, sequences
from sae_persona.activations.texts import read_texts
from sae_persona.errors import DataError, ModelError
from sae_persona.types import HookPoint

HOOK = HookPoint(1)
TEXTS = read_texts([("some words, " * 9)[: 3 + 7 * i % 40] for i in range(50)])
PACKED = Layout(context_size=16, lm_batch=2, which="all", pack=True)
ROW_EACH = Layout(context_size=16, lm_batch=2, which="all", pack=False)
KEEPS_APART = ["Llama", "GPT2", "GPTNeoX", "Gemma", "Gemma3Text", "Qwen2", "Qwen3", "OPT", "Phi", "Mixtral", "GPTJ"]


@pytest.mark.parametrize("lengths", [[5], [16] * 3, [1] * 40, [9, 8, 7, 7, 6, 5, 4, 3, 2, 1, 16], [0, 3, 0]], ids=str)
def test_rows_hold_every_sequence_once_and_are_not_too_long(lengths):
    rows = packed_rows(lengths, 16)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 16 for row in rows)
    assert len(rows) <= -(-sum(lengths) // 16) + 1  # no more than one row more than the tokens need


@pytest.mark.parametrize("layout", [PACKED, ROW_EACH], ids=["packed", "a row each"])
def test_groups_are_the_sequences_in_their_order(lm, layout):
    made = list(groups(lm, TEXTS, layout, Place()))
    assert len(made) > 1 and all(len(f.input_ids) <= 2 and f.input_ids.shape[1] <= 16 for g in made for f in g.forwards)
    want = [tokens.ids for tokens in sequences(lm, TEXTS, 16)]
    assert [one.ids for group in made for one in group.sequences] == want
    for group in made:
        assert torch.equal(torch.cat([f.target for f in group.forwards]).sort().values, torch.arange(group.n))
        ids = torch.empty(group.n, dtype=torch.int64)
        for forward in group.forwards:
            ids[forward.target] = forward.input_ids.flatten()[forward.source]
        assert ids.tolist() == [i for one in group.sequences for i in one.ids if i != lm.bos_id]


@pytest.mark.parametrize("layout", [PACKED, ROW_EACH], ids=["packed", "a row each"])
def test_groups_go_on_from_the_end_of_any_of_them(lm, layout):
    made = list(groups(lm, TEXTS, layout, Place()))
    for i, group in enumerate(made):
        rest = list(groups(lm, TEXTS, layout, group.end))
        assert [g.start for g in rest] == [g.start for g in made[i + 1 :]]
        assert [s.ids for g in rest for s in g.sequences] == [s.ids for g in made[i + 1 :] for s in g.sequences]
        assert all(
            torch.equal(a.input_ids, b.input_ids)
            for g, h in zip(rest, made[i + 1 :], strict=True)
            for a, b in zip(g.forwards, h.forwards, strict=True)
        )


def test_a_packed_group_fills_its_passes(lm):
    group = next(groups(lm, TEXTS, PACKED, Place()))
    tokens = sum(len(one.ids) for one in group.sequences)
    assert FORWARDS * 2 * 16 - 16 < tokens <= FORWARDS * 2 * 16
    assert any(forward.packed for forward in group.forwards)
    assert sum(forward.input_ids.numel() for forward in group.forwards) < 1.15 * tokens


@pytest.mark.parametrize("family", KEEPS_APART)
def test_packed_sequences_see_only_themselves(make_lm, family):
    lm = make_lm(family)
    check_packing(lm, HOOK, 16)
    hooks = [HookPoint(0, "resid_pre"), HOOK]
    for group in groups(lm, TEXTS, PACKED, Place()):
        found = read_group(lm, hooks, group)
        for hook in hooks:
            for i, one in enumerate(group.sequences):
                alone = read(lm, [hook], *padded(lm, [one.ids]))[hook][0, len(one.ids) - found_rows(group, i) :]
                got = found[hook][group.bounds[i] : group.bounds[i + 1]]
                torch.testing.assert_close(got, alone, rtol=0, atol=1e-5)


def found_rows(group, i):
    return group.bounds[i + 1] - group.bounds[i]


def test_a_model_that_mixes_a_row_is_refused(lm, monkeypatch):
    forward = lm.model.forward

    def mixed(input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        return forward(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(lm.model, "forward", mixed)
    with pytest.raises(ModelError, match=r"does not keep the sequences of a row apart .* pass --no-pack"):
        check_packing(lm, HOOK, 16)


def test_a_window_shorter_than_the_rows_is_refused(make_lm):
    lm = make_lm("Mistral")
    lm.model.config.sliding_window = 8
    with pytest.raises(ModelError, match="looks back 8 tokens, which rows of 16 would undo: pass --no-pack"):
        check_packing(lm, HOOK, 16)


def test_half_a_surrogate_pair_is_named(lm):
    texts = read_texts(["fine", "bad \ud800 text"])
    with pytest.raises(DataError, match=r"not valid Unicode, it begins 'bad .*ud800 text': write it again as UTF-8"):
        list(groups(lm, texts, ROW_EACH, Place()))


@pytest.mark.parametrize("rubbish", ["\x00\x01", "\ufeff", "e\u0301" * 30, "\u202e\u200b", "🏴‍☠️" * 9, "\uffff"])
def test_odd_unicode_goes_through(lm, rubbish):
    made = list(groups(lm, read_texts(["a", rubbish, "b"]), PACKED, Place()))
    assert sum(len(group.sequences) for group in made) >= 3


def test_a_tokenizer_without_a_pad_token(make_lm):
    lm = make_lm()
    lm.tokenizer.pad_token = None
    (group,) = groups(lm, read_texts(["a", "a longer one"]), ROW_EACH, Place())
    assert read_group(lm, [HOOK], group)[HOOK].isfinite().all()


def test_empty_documents_are_no_sequences(lm):
    (group,) = groups(lm, read_texts(["", "a", ""]), PACKED, Place())
    assert [one.ids for one in group.sequences] == [[1, *lm.tokenizer("a").input_ids[1:]]]
    assert isinstance(group.sequences[0], Tokens)
