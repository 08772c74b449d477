import math

import pytest
import torch

from sae_persona.activations.stream import StreamConfig
from sae_persona.errors import ConfigError, DataError
from sae_persona.sae.sparsity import Threshold
from sae_persona.studies.fit import RefitConfig, check_fit, drifted_batches, fvu, refit
from sae_persona.studies.snapshots import Snapshot
from sae_persona.types import HookPoint


def test_fvu(make_sae):
    sae = make_sae(6)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    assert fvu(sae, x) < 1e-10
    deaf = make_sae(6)
    deaf.w_dec[0] = 0  # one latent's part is missed, about half the variance of one of six coordinates
    missed = (x[:, 0].clamp(min=0)).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu(deaf, x) == pytest.approx(missed.item(), rel=1e-4)
    assert math.isnan(fvu(sae, x[:1]))


def test_a_bad_fit_is_refused_unless_forced():
    check_fit("a", 0.4, 0.5, force=False)
    check_fit("a", 0.6, 0.5, force=True)
    for found in (0.6, math.nan):
        with pytest.raises(DataError, match="the SAE misses .* of the variance of a"):
            check_fit("a", found, 0.5, force=False)


def test_refit_learns_what_has_drifted_and_leaves_the_rest(make_sae):
    torch.manual_seed(0)
    sae = make_sae(8)
    sae.threshold, before = torch.full((16,), 0.1), sae.w_dec.clone()
    angle = 0.5
    turn = torch.eye(8)
    turn[:2, :2] = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    sae.b_dec += 0
    shift = torch.zeros(8)
    shift[5] = 3.0
    batches = [torch.randn(256, 8) @ turn + shift for _ in range(60)]
    broken = make_sae(8)
    broken.w_dec[0] = torch.nn.functional.normalize(torch.ones(8), dim=0)
    made = refit(broken, batches, RefitConfig(refit_steps=60, refit_lr=1e-2))
    assert fvu(made.sae, batches[0]) < fvu(broken, batches[0]) / 2
    torch.testing.assert_close(made.sae.w_dec.norm(dim=1), torch.ones(16))
    assert made.cosine.shape == (16,) and made.cosine[0] < made.cosine[3]
    assert made.sae.metadata["refit_steps"] == 60
    torch.testing.assert_close(sae.w_dec, before)


def test_thresholds_stay(make_sae):
    sae = make_sae(4)
    sae = type(sae)(sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec, Threshold(torch.full((8,), 0.3)))
    made = refit(sae, [torch.randn(32, 4)] * 3, RefitConfig(refit_steps=2))
    assert made.sae.metadata["refit_steps"] == 2, "no more than asked for"
    torch.testing.assert_close(made.sae.threshold, sae.threshold)


def test_bad_input(make_sae):
    with pytest.raises(DataError, match="no batch"):
        refit(make_sae(4), [])
    with pytest.raises(DataError, match="not finite"):
        refit(make_sae(4), [torch.full((3, 4), float("nan"))])
    with pytest.raises(ConfigError, match="refit_steps"):
        RefitConfig(refit_steps=0)


def test_batches_of_every_model_in_turns(base, make_moved):
    snapshots = [Snapshot(name="base", model=base), Snapshot(name="tuned", model=make_moved(base, 50.0, "tuned"))]
    streaming = StreamConfig(context_size=16, batch_tokens=8, buffer_tokens=16)
    batches = drifted_batches(snapshots, HookPoint(0), ["some text to read"] * 20, streaming, 5)
    assert len(batches) == 5
    far = [bool(x[:, 3].mean() > 25) for x in batches]
    assert far == [False, True, False, True, False]
