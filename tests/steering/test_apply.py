"""Edits are the same whatever the padding, the batch and the cache, and gone when the block ends."""

import pytest
import torch

from sae_persona.activations.hooks import model_inputs, read
from sae_persona.activations.lm import padded
from sae_persona.errors import ConfigError, ModelError
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.apply import intervene
from sae_persona.steering.interventions import Add, Clamp, Scale
from sae_persona.types import HookPoint

HOOK = HookPoint(2)
STRONG = [Clamp(3, 2.0, 6.0), Add(8, 1.0, 4.0)]
GREEDY = AnswerConfig(temperature=0.0, max_new_tokens=10, batch=64)


def logits(lm, prompts, side="left"):
    """Logits at each prompt's last token."""
    input_ids, mask = padded(lm, prompts, side=side)
    out = lm.model(**model_inputs(lm, input_ids, mask)).logits
    last = mask.shape[1] - 1 if side == "left" else mask.sum(1) - 1
    return out[torch.arange(len(prompts)), last]


def hooks(lm):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


@pytest.mark.parametrize("edits", [[], [Add(3, 0.0, 5.0)], [Scale(3, 1.0)]])
@pytest.mark.parametrize("positions", ["answer", "all"])
def test_zero_dose_is_bit_identical(lm, sae, prompts, edits, positions):
    plain, text = logits(lm, prompts), answer(lm, prompts, GREEDY)
    with intervene(lm, sae, edits, positions=positions):
        assert torch.equal(logits(lm, prompts), plain)
        assert answer(lm, prompts, GREEDY) == text


def test_a_dose_changes_the_output(lm, sae, prompts):
    plain, text = logits(lm, prompts), answer(lm, prompts, GREEDY)
    with intervene(lm, sae, STRONG):
        assert (logits(lm, prompts) - plain).abs().max() > 0.5
        assert answer(lm, prompts, GREEDY) != text


@pytest.mark.parametrize("positions", ["answer", "pre", "generated", "all"])
def test_a_batch_is_its_rows_one_by_one(lm, sae, prompts, positions):
    with intervene(lm, sae, STRONG, positions=positions):
        together = answer(lm, prompts, GREEDY)
        alone = [answer(lm, [prompt], GREEDY)[0] for prompt in prompts]
        close = torch.cat([logits(lm, [prompt]) for prompt in prompts])
        torch.testing.assert_close(logits(lm, prompts), close, atol=1e-4, rtol=1e-4)
    assert together == alone


@pytest.mark.parametrize("positions", ["answer", "pre", "generated", "all"])
def test_the_cache_changes_nothing(lm, sae, prompts, positions):
    input_ids, mask = padded(lm, prompts)
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": lm.pad_id}
    with intervene(lm, sae, STRONG, positions=positions):
        cached = lm.model.generate(input_ids, use_cache=True, **options)
        fresh = lm.model.generate(input_ids, use_cache=False, **options)
    assert torch.equal(cached, fresh)


@pytest.mark.parametrize("positions", ["answer", "pre", "all"])
def test_left_padding_is_right_padding(lm, sae, prompts, positions):
    with intervene(lm, sae, STRONG, positions=positions):
        torch.testing.assert_close(logits(lm, prompts), logits(lm, prompts, side="right"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("positions", "edited"),
    [
        ("pre", [3]),
        ("answer", [3, 4, 5]),
        ("generated", [4, 5]),
        ("all", [1, 2, 3, 4, 5]),
        ("every", [0, 1, 2, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_exactly_the_chosen_tokens_change(lm, sae, positions, edited, side):
    """A prompt of 4 tokens, BOS first, and an answer of 2; another row pads it by 3."""
    row = [lm.bos_id, 20, 21, 22, 23, 24]
    longer = [lm.bos_id, *range(30, 38)]
    input_ids, mask = padded(lm, [row, longer], side=side)
    shift = 3 if side == "left" else 0
    plain = read(lm, [HOOK], input_ids, mask)[HOOK]
    with intervene(lm, sae, STRONG, positions=positions, prompt_lengths=[4, 9]):
        after = read(lm, [HOOK], input_ids, mask)[HOOK]
    changed = (after != plain).any(dim=-1)[0].nonzero().flatten().tolist()
    assert changed == [i + shift for i in edited]


def test_a_plain_forward_takes_the_whole_input_for_the_prompt(lm, sae):
    input_ids, mask = padded(lm, [[lm.bos_id, 20, 21, 22]])
    plain = read(lm, [HOOK], input_ids, mask)[HOOK]
    with intervene(lm, sae, STRONG):
        after = read(lm, [HOOK], input_ids, mask)[HOOK]
    assert (after != plain).any(dim=-1)[0].tolist() == [False, False, False, True]


def test_hooks_are_gone_after_the_block_and_after_an_exception(lm, sae, prompts):
    before, plain, own = hooks(lm), logits(lm, prompts), lm.model.generate
    with intervene(lm, sae, STRONG):
        assert hooks(lm) > before
    with pytest.raises(RuntimeError, match="out of luck"), intervene(lm, sae, STRONG):
        raise RuntimeError("out of luck")
    assert hooks(lm) == before
    assert lm.model.generate == own
    assert torch.equal(logits(lm, prompts), plain)


def test_an_exception_inside_generate_leaves_the_next_generate_right(lm, sae, prompts):
    with intervene(lm, sae, STRONG):
        wanted = answer(lm, prompts, GREEDY)
        with pytest.raises(ValueError, match="max_new_tokens"):
            lm.model.generate(torch.tensor([prompts[0]]), max_new_tokens=-1)
        assert answer(lm, prompts, GREEDY) == wanted


def test_blocks_nest(lm, sae, prompts):
    one, two = Clamp(3, 2.0, 6.0), Add(8, 10.0, 6.0)
    with intervene(lm, sae, [one]):
        outer = answer(lm, prompts, GREEDY)
        with intervene(lm, sae, [two]):
            both = answer(lm, prompts, GREEDY)
        assert answer(lm, prompts, GREEDY) == outer
    assert both != outer
    assert lm.model.__dict__.get("generate") is None


def test_beams_and_several_samples_keep_their_prompts(lm, sae, prompts):
    """A clamp that forbids itself at generated tokens gives each returned row the same first step."""
    input_ids, mask = padded(lm, prompts[:2])
    options = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": lm.pad_id, "do_sample": False}
    with intervene(lm, sae, STRONG):
        beams = lm.model.generate(input_ids, num_beams=3, **options)
        again = lm.model.generate(input_ids, num_beams=3, use_cache=False, **options)
    assert torch.equal(beams, again)


def test_what_cannot_be_is_refused(lm, sae, prompts):
    with pytest.raises(ModelError, match=r"layers\.9\.resid_post does not exist"):
        with intervene(lm, sae, [], hook=HookPoint(9)):
            pass
    with pytest.raises(ConfigError, match="one number a row, got 2 for 1 rows"):
        with intervene(lm, sae, STRONG, prompt_lengths=[3, 4]):
            logits(lm, prompts[:1])
    with pytest.raises(ConfigError, match="attention mask of shape"):
        with intervene(lm, sae, STRONG):
            lm.model(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 3))
    assert hooks(lm) == 0
