"""Estimates against what their formulas say, and against finite differences of the model itself."""

import pytest
import torch

from sae_persona.activations.hooks import editing
from sae_persona.attribution.ablation import exact_effects
from sae_persona.attribution.metrics import batches, log_likelihoods, read_and_grade, sides_of
from sae_persona.attribution.patching import attribute
from sae_persona.errors import DataError, ModelError
from sae_persona.types import HookPoint

HOOK = HookPoint(2)


@pytest.fixture(scope="module", params=["pre", "answer", "all"])
def sides(lm, pairs, request):
    return sides_of(lm, pairs[:5], request.param)


def dense(lm, sae, sides):
    """x, signed gradient and dense latents at the edited tokens, side by side."""
    parts = []
    for rows in batches(lm, sides, 4):
        x, g = read_and_grade(lm, HOOK, rows, "sum")
        sign = torch.tensor([float(rows.sides[i].sign) for i in rows.row])
        parts.append((x, g * sign[:, None], sae.encode(x).dense(sae.n_latents)))
    return (torch.cat(part) for part in zip(*parts, strict=True))


def test_estimates_are_what_their_formulas_say(lm, sae, sides):
    x, g, f = dense(lm, sae, sides)
    slope = g @ sae.w_dec.T
    targets = torch.arange(sae.n_latents).double() / 10
    plain, clamped = (attribute(lm, sae, HOOK, sides, targets=c, batch=3) for c in (None, targets))
    torch.testing.assert_close(plain.effect.float(), (slope * -f).sum(0) / 5, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(clamped.effect.float(), (slope * (targets.float() - f)).sum(0) / 5, rtol=1e-3, atol=1e-3)
    delta = (slope * ((x - x.mean(0)) @ sae.w_dec.T)).sum(0) / 5
    torch.testing.assert_close(plain.delta.float(), delta, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(plain.rate.float(), (f > 0).float().mean(0))
    torch.testing.assert_close(plain.size.float(), f.sum(0) / (f > 0).sum(0).clamp(min=1), rtol=1e-4, atol=1e-5)
    assert plain.integrated is None


class _Nudged:
    """Stands for targets: what each latent is now, and a hair more."""

    def to(self, acts):
        return acts + 1e-2


def test_a_small_edit_does_what_the_gradient_says(lm, sae, pairs):
    sides = sides_of(lm, pairs[:3], "answer")
    moved = exact_effects(lm, sae, HOOK, sides, torch.arange(6), targets=_Nudged())
    _, g, _ = dense(lm, sae, sides)
    expected = 1e-2 * (g @ sae.w_dec[:6].T).sum(0).double() / 3
    assert (moved.change.mean(0) - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_integrated_gradient_adds_up_to_the_effect_of_ablating_everything(lm, sae, pairs):
    """Completeness (Sundararajan 2017): the sum over latents is the metric without any latent minus with all."""
    sides = sides_of(lm, pairs[:4], "pre")
    found = attribute(lm, sae, HOOK, sides, integration=40)

    def removed(rows, x):
        y = x.clone()
        here = x[rows.row, rows.position]
        y[rows.row, rows.position] = here - (sae.decode(sae.encode(here)) - sae.b_dec)
        return y

    change = 0.0
    for rows in batches(lm, sides, 8):
        sign = torch.tensor([side.sign for side in rows.sides])
        with torch.no_grad():
            before = log_likelihoods(lm, rows, "sum")
            with editing(lm, HOOK, lambda x, rows=rows: removed(rows, x)):
                after = log_likelihoods(lm, rows, "sum")
        change += float((sign * (after - before)).sum()) / 4
    assert found.integrated is not None
    assert abs(change) > 0.05
    assert float(found.integrated.sum()) == pytest.approx(change, abs=0.05 * abs(change) + 0.02)
    assert float(found.effect.sum()) != pytest.approx(change, abs=0.05 * abs(change))


def test_batches_change_nothing(lm, sae, sides):
    alone, together = (attribute(lm, sae, HOOK, sides, batch=n, integration=1) for n in (1, 10))
    for name in ("effect", "integrated", "delta", "rate"):
        torch.testing.assert_close(getattr(alone, name), getattr(together, name), rtol=1e-3, atol=1e-4)


def test_a_gradient_that_is_not_finite_is_named(lm, sae, pairs):
    sides = sides_of(lm, pairs[:1], "pre")
    said = r"formal-train-0-0, the answer with.*gradient at layers.2.resid_post is not"
    with editing(lm, HookPoint(3), lambda x: x * float("inf")), pytest.raises(DataError, match=said):
        attribute(lm, sae, HOOK, sides)


def test_an_sae_of_another_width_is_refused(lm, sae, pairs):
    narrow = type(sae)(sae.w_enc[:, :5], sae.b_enc, sae.w_dec[:, :5], sae.b_dec[:5], sae.rule)
    with pytest.raises(ModelError, match="reads width 5"):
        attribute(lm, narrow, HOOK, sides_of(lm, pairs[:1], "pre"))
