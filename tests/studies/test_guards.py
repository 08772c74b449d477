"""Guards move the stream, or add to the loss, by what they say, while a model trains and at no other time."""

import numpy as np
import pytest
import torch

from sae_persona.activations.dialogues import tokenize
from sae_persona.activations.hooks import model_inputs, read
from sae_persona.activations.lm import padded
from sae_persona.errors import ConfigError, DataError, ModelError
from sae_persona.studies.finetune import FinetuneConfig, finetune
from sae_persona.studies.guards import firing_rates, guard, panel_targets, penalty, random_targets, steering
from sae_persona.studies.panel import LATENTS, MEANS, PanelConfig, choose_panel, made_of
from sae_persona.studies.readings import Reading, read_prompted, read_prompts
from sae_persona.types import HookPoint

HOOK = HookPoint(0)


def reading(lm, prompts):
    found = read_prompted(lm, HOOK, prompts)
    return Reading(lm.name, found.keys, found.x)


@pytest.fixture
def panel(base, sae, prompt_rows, make_moved):
    """Latent 3 rises by what the embedding is moved by; latent 21, which is -x_5, falls."""
    prompts = read_prompts(prompt_rows)
    bad = make_moved(make_moved(base, 2.0, "bad"), 1.0, "bad", latent=5)
    config = PanelConfig(n_up=1, n_down=1)
    return choose_panel(
        sae, HOOK, prompts, reading(base, prompts), [reading(bad, prompts)], [], config, about=made_of(base)
    )


@pytest.fixture
def inputs(base, prompt_rows):
    ids = [tokenize(base, row["messages"][0]["content"]).ids for row in prompt_rows[:3]]
    return padded(base, ids, side="right")


def test_targets_are_the_panels(panel, sae):
    latents, means = panel_targets(panel, sae)
    assert (latents.name, latents.latents, means.name) == (LATENTS, panel.latents, MEANS)
    signs = torch.tensor(panel.sign[:2], dtype=torch.float32)
    assert set(signs.tolist()) == {1.0, -1.0}
    wanted = (signs[:, None] * sae.w_dec[list(panel.latents)]).sum(0)
    torch.testing.assert_close(latents.write, wanted / wanted.norm())
    torch.testing.assert_close(means.write, panel.weight[panel.names.index(MEANS)])
    torch.testing.assert_close(latents.spread.double(), panel.spread[:2])


def test_steering_is_on_within_the_block_alone(panel, sae, base, inputs):
    (target, _), (ids, mask) = panel_targets(panel, sae), inputs
    plain = read(base, [HOOK], ids, mask)[HOOK]
    with guard("steer", target, HOOK, 0.5, base=base, scale=3.0)(base) as term:
        assert term is None
        steered = read(base, [HOOK], ids, mask)[HOOK]
    edited = mask.bool() & (ids != base.bos_id)
    torch.testing.assert_close(steered[edited], plain[edited] + 1.5 * target.write)
    assert torch.equal(steered[~edited], plain[~edited])
    assert torch.equal(read(base, [HOOK], ids, mask)[HOOK], plain)


def test_a_penalty_is_the_squared_rise_of_real_tokens(panel, sae, base, make_moved, inputs):
    (target, _), (ids, mask) = panel_targets(panel, sae), inputs
    tuned = make_moved(base, 0.7, "tuned")
    tuned.model.requires_grad_(True)
    with torch.enable_grad(), penalty(target, HOOK, 2.0, base=base)(tuned) as term:
        tuned.model(**model_inputs(tuned, ids, mask))
        loss = term()
    rises = [read(lm, [HOOK], ids, mask)[HOOK][mask.bool()] @ target.reads.T for lm in (tuned, base)]
    wanted = 2.0 * (((rises[0] - rises[1]) / target.spread).clamp(min=0) ** 2).mean()
    torch.testing.assert_close(loss.detach(), wanted)
    loss.backward()
    assert tuned.model.get_input_embeddings().weight.grad.abs().sum() > 0
    with penalty(target, HOOK, 2.0, base=base)(base) as term:
        base.model(**model_inputs(base, ids, mask))
        assert term() == 0


def test_a_penalty_holds_the_panel_down(panel, sae, base, prompt_rows):
    rows = [{"messages": [*row["messages"], {"role": "assistant", "content": "zz"}]} for row in prompt_rows]
    target, config = panel_targets(panel, sae)[0], FinetuneConfig(steps=12, batch=4, lr=1e-2, keep=())

    def rise(during):
        ((_, tuned),) = finetune(base, rows, config, during=during)
        return max(abs(panel.score(tuned)[f"latent {i}"].value) for i in panel.latents)

    assert rise(penalty(target, HOOK, 100.0, base=base)) < 0.3 * rise(None)


def test_steering_through_a_step_trains_without_what_is_added(panel, sae, base, prompt_rows):
    rows = [{"messages": [*row["messages"], {"role": "assistant", "content": "zz"}]} for row in prompt_rows]
    config = FinetuneConfig(steps=2, batch=4, keep=())
    ends = []
    for during in (None, steering(panel_targets(panel, sae)[0], HOOK, 5.0)):
        ((_, tuned),) = finetune(base, rows, config, during=during)
        ends.append(torch.cat([p.flatten() for p in tuned.model.parameters()]))
    assert not torch.equal(*ends), "the guard changed what was learned"


def test_controls_fire_as_often_and_are_others(panel, sae, base):
    rates = np.linspace(0.01, 0.32, sae.n_latents)
    x = torch.randn(9, base.d_model, generator=torch.Generator().manual_seed(0))
    found = random_targets(panel, sae, x, rates, 2, seed=0)
    picked = [latent for one in found for latent in one.latents]
    assert [len(one.latents) for one in found] == [2, 2] and len({*picked, *panel.latents}) == 6
    for one in found:
        for latent, own in zip(one.latents, panel.latents, strict=True):
            assert abs(np.log(rates[latent] / rates[own])) < 1
    again = random_targets(panel, sae, x, rates, 2, seed=0)
    assert [one.latents for one in again] == [one.latents for one in found]
    with pytest.raises(DataError, match="more than the SAE has others that fire"):
        random_targets(panel, sae, x, np.where(np.arange(32) < 5, 0.1, 0.0), 4, seed=0)


def test_firing_rates_are_over_all_tokens(base, sae, prompt_rows):
    rates = firing_rates(base, sae, HOOK, prompt_rows)
    np.testing.assert_allclose(rates[:16] + rates[16:], 1.0)  # x_i is above or below 0 at every token


def test_what_does_not_fit_is_refused(panel, sae, base, make_sae):
    with pytest.raises(ModelError, match="chosen with another SAE"):
        other = make_sae(base.d_model)
        with torch.no_grad():
            other.b_dec += 1
        panel_targets(panel, other)
    with pytest.raises(ConfigError, match="a guard is steer or penalty, got 'clamp'"):
        guard("clamp", panel_targets(panel, sae)[0], HOOK, 1.0, base=base, scale=1.0)  # pyright: ignore
