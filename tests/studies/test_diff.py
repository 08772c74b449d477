import math

import numpy as np
import pytest
import torch

from sae_persona.attribution.contrasts import Contrast
from sae_persona.errors import ConfigError, DataError, FormatError, ModelError
from sae_persona.features.pooled import to_csr
from sae_persona.runs import write_json
from sae_persona.studies.diff import Diff, DiffConfig, diff, scaling
from sae_persona.studies.readings import read_prompts
from sae_persona.studies.snapshots import Snapshot

SMALL = DiffConfig(top=4, permutations=99, resamples=50)
D = 16


@pytest.fixture
def prompts(prompt_rows):
    return read_prompts(prompt_rows)


def tuned(lm):
    return Snapshot(name=lm.name, model=lm)


def test_the_planted_latent_rose_most(base, sae, prompts, make_moved, tmp_path):
    """Its mirror image fell as much; the other model moved another latent."""
    models = [make_moved(base, 4.0, "up"), make_moved(base, 4.0, "other", latent=9)]
    found = diff(base, map(tuned, models), sae, prompts, SMALL)
    first, second = found.tuned
    assert first.up[0].latent == 3 and first.down[0].latent == D + 3 and second.up[0].latent == 9
    best = first.up[0]
    assert best.shift.low <= best.shift.value <= best.shift.high and best.shift.value == pytest.approx(4, abs=0.5)
    assert best.shift.value == pytest.approx(-first.down[0].shift.value, abs=1e-5)
    assert best.p_max_t == pytest.approx(0.01) and first.n_rose >= 1 and first.n_fell >= 1
    assert best.tuned_act > best.base_act + 3 and best.sds > 3
    assert best.encoded == pytest.approx(best.shift.value, abs=1e-4), "without bias and threshold they are the same"
    assert found.fvu < 1e-6 and first.fvu < 1e-6 and first.n_prompts == len(prompts)
    names = [one.name for one in first.dense]
    assert names == ["latent 3", "difference of means", "PCA of the difference", "linear probe"]
    assert first.dense[0].auroc.value == 1 and first.dense[1].auroc.value == 1
    found.save(tmp_path / "diff.json")
    again = Diff.load(tmp_path / "diff.json")
    assert (str(again) == str(found) and again.tuned[0].up == first.up) or math.isnan(first.up[0].delta)
    assert "up: 9 prompts" in str(found)


def test_nothing_moved(base, sae, prompts, make_moved):
    (same,) = diff(base, [tuned(make_moved(base, 0.0, "same"))], sae, prompts, SMALL).tuned
    assert same.n_rose == same.n_fell == 0 and not same.up and not same.down
    assert same.dense[1].auroc.value == pytest.approx(0.5)


@pytest.mark.parametrize("family", ["GPT2", "Qwen2"])
def test_other_families(make_lm, make_sae, make_moved, prompts, family):
    lm = make_lm(family)
    from sae_persona.types import HookPoint

    found = diff(lm, [tuned(make_moved(lm, 4.0, "up"))], make_sae(lm.d_model), prompts, SMALL, hook=HookPoint(0))
    assert found.tuned[0].up[0].latent == 3


def test_delta_comes_from_within_the_tuned_model(base, sae, prompts, make_moved):
    pairs = [Contrast(persona_answer="bad", other_answer="good", messages=(dict(role="user", content="so"),))]
    (one,) = diff(base, [tuned(make_moved(base, 4.0, "up"))], sae, prompts, SMALL, contrasts=pairs).tuned
    assert len(one.by_delta) == 4 and one.by_delta[0][1] >= one.by_delta[1][1]
    assert math.isfinite(one.up[0].delta)


def test_scaling_tells_new_from_kept(make_sae):
    """Against the definition: the coefficient of f on what the other latents leave, projected on the direction."""
    sae = make_sae(4)
    g = torch.Generator().manual_seed(0)
    base = torch.rand(30, 4, generator=g)
    after = base.clone()
    base[:, 0] = 0.0  # new
    after[:, 1] *= 2  # amplified
    sae.w_dec[2] *= 0.9  # so that there is an error
    acts = [to_csr(sae.encode(x), 8) for x in (base, after)]
    found = scaling(sae, base, after, *acts)
    f, expected = sae.encode(after).dense(8).double(), []
    for x in (base, after):
        own = sae.encode(x).dense(8)
        rest = x - (own @ sae.w_dec + sae.b_dec)
        betas = []
        for i in range(4):
            target = (rest + own[:, i : i + 1] * sae.w_dec[i]).double()
            d = sae.w_dec[i].double()
            betas.append(((target.T @ f[:, i]) @ d / (f[:, i].square().sum() * d.square().sum())).item())
        expected.append(np.array(betas))
    np.testing.assert_allclose(found[:4], expected[0] / expected[1], rtol=1e-5)
    assert found[0] == pytest.approx(0, abs=1e-6) and found[1] == pytest.approx(0.5) and found[3] == pytest.approx(1)
    assert np.isnan(found[4:]).all(), "they fire on no prompt"


def test_an_sae_of_another_model_is_refused_unless_forced(base, sae, prompts, make_moved):
    sae.w_dec.copy_(torch.nn.functional.normalize(torch.randn(2 * D, D), dim=1))
    models = [tuned(make_moved(base, 1.0, "up"))]
    with pytest.raises(DataError, match="the SAE misses"):
        diff(base, models, sae, prompts, SMALL)
    forced = DiffConfig(top=4, permutations=99, resamples=50, force=True)
    assert diff(base, models, sae, prompts, forced).fvu > 0.5


def test_bad_input(base, sae, make_sae, prompts, make_lm, make_moved, tmp_path):
    with pytest.raises(ModelError, match="model_type"):
        diff(base, [tuned(make_lm("GPT2"))], sae, prompts, SMALL)
    with pytest.raises(DataError, match="no tuned model"):
        diff(base, [], sae, prompts, SMALL)
    with pytest.raises(ModelError, match="reads width 8"):
        diff(base, [tuned(base)], make_sae(8, sae.metadata), prompts, SMALL)
    broken = make_moved(base, 1.0, "broken")
    with torch.no_grad():
        broken.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="broken is broken"):
        diff(base, [tuned(broken)], sae, prompts, SMALL)
    with pytest.raises(ConfigError, match="top"):
        DiffConfig(top=0)
    write_json(tmp_path / "x.json", {"kind": "diff", "format": 0})
    with pytest.raises(FormatError, match="diff of format 1"):
        Diff.load(tmp_path / "x.json")
