import math

import pytest
import torch

from sae_persona.errors import ConfigError
from sae_persona.steering.dial import DialConfig, OutOfReach, _Search, solve_strength
from sae_persona.steering.divergence import DivergenceConfig, Readings, Track
from sae_persona.steering.interventions import Add, Steer
from sae_persona.types import HookPoint

READING = DivergenceConfig(n_tokens=5, n_prompts=4)


def readings(kl):
    return Readings(kl_mean=kl / 2, kl_tail=kl, ratio_mean=None, ratio_p95=None, n_tokens=1)


def solved(curve, **config):
    search = _Search(lambda s: readings(curve(s)), DialConfig(**config))
    return search.solve(), search.found


@pytest.mark.parametrize("power", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("scale", [0.02, 0.9, 30.0])
def test_a_power_of_the_strength_is_solved_at_once(power, scale):
    strength, found = solved(lambda s: scale * s**power, low=1e-4, high=1e4)
    assert scale * strength**power == pytest.approx(1.0, rel=0.05)
    assert len(found) <= 7


def test_a_curve_that_bends_is_solved_in_twelve_steps():
    """Quadratic, then saturated at twice the budget: as logits are."""
    for budget in (0.3, 1.0, 1.8):
        strength, found = solved(lambda s: 2 * (1 - math.exp(-((s / 3) ** 2))), budget=budget)
        assert found[strength].kl_tail == pytest.approx(budget, rel=0.05)
        assert len(found) <= 12


def test_budgets_out_of_reach_are_refused_with_the_numbers():
    with pytest.raises(
        OutOfReach, match=r"no strength up to 16 reaches 1 nats: the largest divergence is 0.4 nats, at"
    ):
        solved(lambda s: min(0.1 * s, 0.4))
    with pytest.raises(OutOfReach, match=r"0.5 nats, at strength 4:") as caught:  # it falls again
        solved(lambda s: 0.5 if s == 4 else 0.1)
    assert caught.value.strength == 4 and caught.value.readings.kl_tail == 0.5
    with pytest.raises(OutOfReach, match=r"3 nats already at strength 0.01, above the budget of 1"):
        solved(lambda s: 3.0)
    with pytest.raises(OutOfReach, match="12 strengths do not meet 1 nats: it lies between strengths") as caught:
        solved(lambda s: 0.1 if s < 2.345 else 5.0)
    assert caught.value.strength == pytest.approx(2.345, rel=0.01) and caught.value.readings.kl_tail == 5.0


@pytest.mark.parametrize(
    "bad",
    [{"budget": math.nan}, {"budget": 0.0}, {"budget": math.inf}, {"low": 2.0, "high": 1.0}, {"low": math.nan},
     {"tolerance": 0.0}, {"max_steps": 1}],
)  # fmt: skip
def test_settings_that_cannot_be(bad):
    with pytest.raises(ConfigError):
        DialConfig(**bad)


def test_a_latent_and_a_direction_are_dialled_to_one_budget(lm, sae, prompts):
    config = DialConfig(budget=0.2, reading=READING)
    track = Track(lm, prompts, READING)
    v = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(3))
    latent = solve_strength(lm, sae, lambda s: [Add(2, s, 4.0)], prompts, config, track=track)
    dense = solve_strength(lm, None, lambda s: [Steer(v, s)], prompts, config, hook=HookPoint(2), track=track)
    for dial in (latent, dense):
        assert dial.readings.kl_tail == pytest.approx(0.2, rel=0.05)
        assert dial.readings.kl_mean < dial.readings.kl_tail
        assert dial.readings.ratio_mean > 0
    assert latent.readings == Track(lm, prompts, READING).read(sae, [Add(2, latent.strength, 4.0)])
    assert latent.readings.edits[0].value == pytest.approx(4.0 * latent.strength)
    assert latent.tried == tuple(sorted(latent.tried))
    assert (
        "for a budget of 0.2 nats" in str(latent)
        and latent.to_json()["readings"]["n_tokens"] == dense.readings.n_tokens
    )


def test_a_divergence_that_falls_is_told():
    from sae_persona.steering.dial import Dial

    fell = Dial(strength=2.0, budget=1.0, readings=readings(1.0), tried=((0.5, 0.4), (1.0, 0.2), (2.0, 1.0)))
    assert not fell.monotone and fell.fall == (0.5, 1.0)
    assert "falls between strengths 0.5 and 1" in str(fell)
    rose = Dial(strength=2.0, budget=1.0, readings=readings(1.0), tried=((0.5, 0.1), (1.0, 0.2), (2.0, 1.0)))
    assert rose.monotone and "falls" not in str(rose)


def test_a_strength_that_is_no_number_is_refused(lm, sae, prompts):
    with pytest.raises(ConfigError, match="needs finite numbers"):
        solve_strength(lm, sae, lambda s: [Add(2, s * math.nan, 4.0)], prompts, DialConfig(reading=READING))
