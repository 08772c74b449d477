"""Operations against their formulas, pins read back, edits that meet."""

import math

import pytest
import torch

from sae_persona.errors import ConfigError
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU
from sae_persona.steering.interventions import (
    Ablate,
    Cap,
    Ceiling,
    Clamp,
    Floor,
    Pin,
    Placed,
    ProjectionClamp,
    ProjectOut,
    Steer,
    placed,
)
from sae_persona.steering.rows import EditsMeet, Rows, wins

MANY = 200


@pytest.fixture
def x(lm):
    return 2 * torch.randn(MANY, lm.d_model, generator=torch.Generator().manual_seed(1))


def direction(lm, seed=2):
    return torch.randn(lm.d_model, generator=torch.Generator().manual_seed(seed))


def edited(x, *edits, sae=None):
    return Rows.of(placed(edits, hook=None, positions="all"), sae, x.shape[1]).moved(x)


@pytest.mark.parametrize("latent", [3, 5])
def test_floor_and_ceiling_move_only_what_is_beyond(sae, x, latent):
    acts = sae.latents_at(x, torch.tensor([latent]))
    for edit, beyond in ((Floor(latent, 2.0, 3.0), acts < 6), (Ceiling(latent, 2.0, 3.0), acts > 6)):
        out = edited(x, edit, sae=sae)
        assert 0 < int(beyond.sum()) < MANY
        assert torch.equal(out[~beyond[:, 0]], x[~beyond[:, 0]])
        torch.testing.assert_close(out, x + (6 - acts) * beyond * sae.directions(torch.tensor([latent])))


def test_projections(lm, x):
    v = direction(lm)
    unit = v / v.norm()
    at = x @ unit
    torch.testing.assert_close(edited(x, Steer(v, -0.5)), x - 0.5 * v)
    torch.testing.assert_close(edited(x, ProjectionClamp(v, 1.5)) @ unit, torch.full((MANY,), 1.5), atol=1e-5, rtol=0)
    for keep, want in (("below", at.clamp(max=0.7)), ("above", at.clamp(min=0.7))):
        out = edited(x, Cap(3 * v, 0.7, keep))
        torch.testing.assert_close(out @ unit, want, atol=1e-5, rtol=0)
        same = at == want
        assert 0 < int(same.sum()) < MANY and torch.equal(out[same], x[same])


def test_projecting_out_removes_the_span_and_nothing_else(lm, x):
    a, b = direction(lm, 2), direction(lm, 3)
    out = edited(x, ProjectOut(torch.stack([a, b, a + 2 * b])))  # the third is in the span of the others
    q, _ = torch.linalg.qr(torch.stack([a, b], dim=1).double())
    want = x.double() - x.double() @ q @ q.T
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(edited(out, ProjectOut(torch.stack([a, b]))), out, atol=1e-5, rtol=0)


def test_zero_doses_are_bit_identical(lm, sae, x):
    v = direction(lm)
    at = float((x @ (v / v.norm())).abs().max()) + 1
    acts = float(sae.latents_at(x, torch.tensor([3])).max()) + 1
    for edit in (Steer(v, 0.0), Cap(v, at, "below"), Cap(v, -at, "above")):
        assert torch.equal(edited(x, edit), x)
    for edit in (Floor(3, 0.0, 1.0), Ceiling(3, 1.0, acts)):
        assert torch.equal(edited(x, edit, sae=sae), x)
    dead = SAE(sae.w_enc, sae.b_enc - 1e4, sae.w_dec, sae.b_dec, sae.rule)
    assert torch.equal(edited(x, Ablate(3), sae=dead), x)


@pytest.mark.parametrize("rule", ["threshold", "relu"])
def test_a_pin_is_read_back_and_a_clamp_is_not(sae, x, rule):
    if rule == "relu":
        sae = SAE(sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec, ReLU())
    idx, want = torch.tensor([2, 5, 9]), torch.tensor([2.0, 5.0, 3.0])
    steer = Steer(torch.ones(x.shape[1]), 0.3)
    pins = [Pin(int(i), 1.0, float(value)) for i, value in zip(idx, want, strict=True)]
    out = edited(x, *pins, steer, sae=sae)
    torch.testing.assert_close(sae.latents_at(out, idx), want.expand(MANY, -1), atol=2e-4, rtol=0)
    clamps = [Clamp(pin.latent, pin.strength, pin.unit) for pin in pins]
    assert (sae.latents_at(edited(x, *clamps, sae=sae), idx) - want).abs().max() > 0.1
    torch.testing.assert_close(edited(out, *pins, sae=sae), out, atol=1e-3, rtol=0)


def test_pins_that_cannot_be(sae, topk_sae, x):
    with pytest.raises(ConfigError, match="a pin of latent 3 needs a target above 0, got 0: use ablate"):
        Pin(3, 0.0, 1.0)
    with pytest.raises(ConfigError, match="latent 3 fires above 0.5, so it cannot be pinned to 0.25"):
        edited(x, Pin(3, 0.5, 0.5), sae=sae)
    with pytest.raises(ConfigError, match="latent 3 cannot be pinned: under TopK it depends on the others"):
        edited(x, Pin(3, 1.0, 1.0), sae=topk_sae)
    twins = SAE(sae.w_enc, sae.b_enc, sae.w_dec.index_copy(0, torch.tensor([4]), sae.w_dec[3:4]), sae.b_dec, sae.rule)
    with pytest.raises(ConfigError, match=r"no move pins latents 3, 4 at once: .* singular"):
        edited(x, Pin(3, 1.0, 1.0), Pin(4, 1.0, 1.0), sae=twins)
    for one, other in (({"positions": "all"}, {"positions": "pre"}), ({}, {"hook": None, "priority": 1})):
        edits = [Placed(edit=Pin(i, 1.0, 1.0), **where) for i, where in ((3, one), (5, other))]
        if one:
            with pytest.raises(ConfigError, match="pins of one hook point are solved together"):
                Rows.of(edits, sae, x.shape[1])
        else:
            Rows.of(edits, sae, x.shape[1])


def test_a_pinned_latent_takes_no_other_edit(sae, x):
    edits = [Placed(edit=Pin(3, 1.0, 2.0)), Placed(edit=Clamp(3, 1.0, 5.0), priority=1)]
    with pytest.raises(ConfigError, match="latent 3 is pinned, which is solved with all pins on"):
        Rows.of(edits, sae, x.shape[1])


def test_partial_and_full_encoders_are_named(lm, sae, topk_sae):
    v = direction(lm)
    for one, edit, encoder in (
        (sae, Ablate(1), "partial"),
        (topk_sae, Ablate(1), "full"),
        (topk_sae, Steer(v, 1.0), "partial"),
    ):
        assert Rows.of(placed([edit], hook=None, positions="all"), one, lm.d_model).encoder == encoder


def test_latents_and_directions_mix_under_topk(lm, topk_sae, x):
    v = direction(lm)
    acts = topk_sae.latents_at(x, torch.tensor([7]))
    want = x + (4.0 - acts) * topk_sae.directions(torch.tensor([7])) + v
    torch.testing.assert_close(edited(x, Steer(v, 1.0), Clamp(7, 2.0, 2.0), sae=topk_sae), want, atol=1e-4, rtol=1e-4)


def test_edits_of_one_latent_need_a_rule(sae, x):
    a, b = Clamp(3, 1.0, 1.0), Clamp(3, 1.0, 2.0)
    with pytest.raises(ConfigError, match="latent 3 is edited twice at the same tokens: .* priorities"):
        edited(x, a, b, sae=sae)
    apart = [Placed(edit=a, positions="pre"), Placed(edit=b, positions="generated")]
    assert len(Rows.of(apart, sae, x.shape[1]).owner) == 2
    ranked = [Placed(edit=a, priority=1), Placed(edit=b, priority=2)]
    assert len(Rows.of(ranked, sae, x.shape[1]).owner) == 2
    on = torch.tensor([[True, True], [True, False], [False, True]])
    assert wins(ranked, on).tolist() == [[False, True], [True, False], [False, True]]
    assert len(Rows.of(placed([a, b], hook=None, positions="all"), sae, x.shape[1], requests=[0, 1]).owner) == 2


def test_correlated_directions_are_warned_of(lm, sae, x, recwarn):
    v = direction(lm)
    w = v + 0.5 * direction(lm, 9) * v.norm() / direction(lm, 9).norm()
    cosine = float(torch.cosine_similarity(v, w, dim=0))
    with pytest.warns(EditsMeet, match=rf"a direction and a direction pull on directions with cosine \+{cosine:.2f}"):
        edited(x, Steer(v, 1.0), Steer(w, 1.0))
    recwarn.clear()
    edited(x, Steer(v, 1.0), Steer(direction(lm, 9), 1.0), Clamp(3, 1.0, 1.0), sae=sae)
    assert not recwarn.list


@pytest.mark.parametrize(
    "make",
    [
        lambda: Steer(torch.zeros(4), 1.0),
        lambda: ProjectOut(torch.tensor([[1.0, 0.0], [math.nan, 0.0]])),
        lambda: ProjectionClamp(torch.ones(2, 2), 1.0),
        lambda: Cap(torch.tensor([math.inf, 0.0]), 1.0, "below"),
    ],
)
def test_what_is_no_direction_is_refused(make):
    with pytest.raises(ConfigError, match="a direction is a finite vector"):
        make()


def test_other_mistakes(x):
    with pytest.raises(ConfigError, match="keeps the projection below or above its value, got 'up'"):
        Cap(torch.ones(3), 1.0, "up")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="needs finite numbers, got nan"):
        ProjectionClamp(torch.ones(3), math.nan)
    with pytest.raises(ConfigError, match="as many numbers as the stream"):
        edited(x, Steer(torch.ones(3), 1.0))
    with pytest.raises(ConfigError, match="an edit of latent 2 needs the SAE of its hook point, got none"):
        edited(x, Ablate(2))
