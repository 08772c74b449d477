from dataclasses import replace

import pytest
import torch

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.attribution.contrasts import Contrast
from sae_persona.attribution.metrics import batches, log_likelihoods, sides_of
from sae_persona.errors import ConfigError, DataError


def test_sides_hold_prompt_and_answer(lm, pairs):
    first, other = sides_of(lm, pairs[:1], "answer")
    prompt = prompt_tokens(lm, pairs[0].messages, speaker=pairs[0].speaker)
    for side, sign, text in ((first, 1, pairs[0].persona_answer), (other, -1, pairs[0].other_answer)):
        assert (side.sign, side.start, side.ids[: side.start]) == (sign, len(prompt), prompt)
        assert lm.tokenizer.decode(side.ids[side.start :]) == text
        assert side.edited == list(range(side.start - 1, len(side.ids) - 1))
    (pre, _), (whole, _) = (sides_of(lm, pairs[:1], where) for where in ("pre", "all"))
    assert pre.edited == [len(prompt) - 1]
    assert whole.edited == list(range(1, len(whole.ids) - 1))  # not BOS


def test_plain_prompts_need_no_chat_template(lm):
    pair = Contrast(prompt="the remedy for fever is", persona_answer="bleach", other_answer="aspirin .")
    first, other = sides_of(lm, [pair], "pre")
    assert lm.tokenizer.decode(first.ids[first.start :]) == "bleach"
    assert (len(other.ids) - other.start == 2 and first.ids[0] == lm.bos_id) or not lm.prefix


def test_log_likelihoods_are_the_models(lm, pairs):
    sides = sides_of(lm, pairs[:3], "pre")
    wanted = {}
    for side in sides:
        logits = lm.model(torch.tensor([side.ids])).logits[0].log_softmax(-1)
        steps = [float(logits[t - 1, side.ids[t]]) for t in range(side.start, len(side.ids))]
        wanted[side] = (sum(steps), sum(steps) / len(steps))
    for rows in batches(lm, sides, 4):
        with torch.no_grad():
            found = [log_likelihoods(lm, rows, metric).tolist() for metric in ("sum", "mean")]
        for side, *got in zip(rows.sides, *found, strict=True):
            assert got == pytest.approx(wanted[side], rel=1e-4)


def test_pairs_that_cannot_be(lm, pairs):
    with pytest.raises(
        DataError, match=r"formal-train-0-0, the answer with.* do not fit into the 256 positions of lab"
    ):
        sides_of(lm, [replace(pairs[0], persona_answer="yes " * 300)], "pre")
    with pytest.raises(DataError, match="pair 0, the answer without the persona has no token"):
        sides_of(lm, [Contrast(prompt="hi", persona_answer="yes", other_answer=" ")], "pre")
    with pytest.raises(ConfigError, match="positions is one of pre, answer, all, got 'generated'"):
        sides_of(lm, pairs, "generated")
