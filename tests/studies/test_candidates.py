import pytest
import torch

from sae_persona.errors import DataError, ModelError
from sae_persona.features.stats import LatentStats
from sae_persona.steering.interventions import Ablate, Ceiling, Clamp
from sae_persona.studies.candidates import Candidate, MeasuredSAE, drift
from sae_persona.studies.readings import Prompt
from sae_persona.types import HookPoint, SparseLatents

HOOK = HookPoint(0)


def prompts(planted):
    return [Prompt(str(i), tuple(row["messages"])) for i, row in enumerate(planted.development)]


def found(planted, **changes):
    asked = {
        "sites": [MeasuredSAE(planted.sae)],
        "n_up": 1,
        "n_down": 1,
        "max_fvu": 0.5,
        "prompts": prompts(planted),
    } | changes
    return drift(planted.base, planted.tuned, **asked)


def test_what_a_fine_tune_moved_is_found(planted):
    stats = LatentStats(32)
    stats.update(SparseLatents(torch.full((10, 1), 2.0), torch.full((10, 1), 19)))
    moved = found(planted, sites=[MeasuredSAE(planted.sae, stats)])
    risen, fallen = sorted(moved.candidates, key=lambda one: one.latent)
    assert (risen.latent, fallen.latent) == (3, 19), "the coordinate, and its negative"
    assert risen.rise == pytest.approx(4, abs=0.3) and fallen.rise == pytest.approx(-4, abs=0.3)
    assert risen.base_act == 0 and risen.tuned_act == pytest.approx(2, abs=0.3)
    assert int(moved.direction[HOOK].abs().argmax()) == 3
    assert moved.fvu[HOOK] == pytest.approx((0, 0), abs=1e-6)


def test_units_are_the_corpus_where_it_knows_and_the_tuned_models_elsewhere(planted):
    stats = LatentStats(32)
    stats.update(SparseLatents(torch.full((10, 1), 5.0), torch.full((10, 1), 3)))
    measured = found(planted, sites=[MeasuredSAE(planted.sae, stats)], n_up=2, n_down=0)
    by_latent = {one.latent: one for one in measured.candidates}
    assert by_latent[3].unit == pytest.approx(5, rel=0.07)
    other = next(one for one in measured.candidates if one.latent != 3)
    assert 0 < other.unit < 3
    without = found(planted, n_up=0, n_down=32).candidates
    assert without and 19 not in {one.latent for one in without}, "it fires in no tuned model, so it has no unit"


def test_what_each_mode_makes_of_a_latent():
    risen = Candidate(HOOK, 3, 4.0, 2.0, 0.0, 2.0)
    fallen = Candidate(HOOK, 5, -4.0, 2.0, 2.0, 0.0)
    assert risen.edit("ablate").edit == Ablate(3) and risen.edit("cap", 0.1).edit == Ceiling(3, 0.1, 2.0)
    assert risen.edit("clamp", 1.5).edit == Clamp(3, -1.5, 2.0) and fallen.edit("clamp", 1.5).edit == Clamp(5, 1.5, 2.0)
    assert [fallen.can(mode) for mode in ("ablate", "cap", "clamp")] == [False, False, True]
    assert risen.edit("clamp", 1.0, "pre").positions == "pre" and risen.edit("ablate").hook == HOOK


def test_what_cannot_be_is_refused(planted, make_sae):
    with pytest.raises(DataError, match="no latent differs between base and base"):
        drift(planted.base, planted.base, [MeasuredSAE(planted.sae)], prompts(planted), n_up=1, n_down=1, max_fvu=0.5)
    stranger = make_sae(16, {"hook": str(HOOK)})
    with torch.no_grad():
        stranger.w_dec.normal_()
    with pytest.raises(DataError, match="misses .* of the variance of base"):
        found(planted, sites=[MeasuredSAE(stranger)])
    forced = found(planted, sites=[MeasuredSAE(stranger)], force=True)
    assert forced.fvu[HOOK][0] > 0.5
    with torch.no_grad():
        planted.tuned.model.get_input_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="tuned is broken"):
        found(planted)
