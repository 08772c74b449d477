"""The main job, whole and small: every stage runs and leaves what it should."""

import json

from sae_persona.attribution.ranking import Ranking
from sae_persona.features.measure import Measurement
from sae_persona.runs import Run
from sae_persona.steering.arms import Sweep
from sae_persona.studies.certificate import Certificate


def test_every_stage_leaves_its_files(demo_run):
    run = Run.open(demo_run.path)
    stages = [entry["stage"] for entry in run.manifest["stages"]]
    assert stages == ["train", "quality", "measure", "rank", "rank", "sweep", "export", "sweep", "export", "reverse"]
    names = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    assert names == {
        *("manifest.json", "metrics.jsonl", "quality.json", "latents.h5", "examples.h5", "report.html"),
        *("sae/cfg.json", "sae/sae_weights.safetensors"),
        *(f"{folder}/{t}.json" for folder in ("rankings", "sweeps", "interventions") for t in ("cheerful", "formal")),
        *(f"interventions/{t}.safetensors" for t in ("cheerful", "formal")),
        *("reversal.json", "reversal.html", "reversal-edit.json", "reversal-edit.safetensors"),
    }


def test_even_a_small_run_finds_and_moves_a_surface_trait(demo_run):
    ranking = Ranking.load(demo_run.ranking("cheerful"))
    assert ranking[0].held_out_auroc.value > 0.9
    assert ranking[0].p_max_t < 0.01
    assert Sweep.load(demo_run.sweep("cheerful")).chosen.gain.value > 0.2


def test_the_manifest_says_what_was_done(demo_run):
    trained = demo_run.stage("train")
    assert trained["model"]["name"] == "lab"
    assert trained["hook"] == "layers.3.resid_post"
    assert trained["training"]["n_latents"] == 256
    assert demo_run.stage("measure")["examples"] == len(Measurement.load(demo_run).pooled.ids) == 340


def test_quality_is_better_than_ablation(demo_run):
    q = json.loads(demo_run.quality.read_text())
    assert 0 < q["fvu"] < 0.5
    assert q["ce"] < q["ce_spliced"] < q["ce_zero"]
    assert q["kl_spliced"] < q["kl_mean"]


def test_bad_answers_about_one_domain_spread_and_an_edit_takes_most_of_them_back(demo_run):
    made = Certificate.load(demo_run.path / "reversal.json")
    rates = demo_run.stage("reverse")["rates"]
    assert rates["bad"] > 0.5 and max(rates["before"], rates["good"]) < 0.2
    before, after = (made.arm(kind).cells["out of domain"].rate.value for kind in ("tuned", "chosen"))
    assert before > 0.5 and after < before / 2
    assert demo_run.stage("reverse")["verdict"] == made.verdict
