import shutil

import numpy as np
import pytest
import torch

from sae_persona.activations.lm import load_lm
from sae_persona.activations.stream import StreamConfig
from sae_persona.attribution.rank import RankConfig
from sae_persona.attribution.ranking import Ranking
from sae_persona.errors import DataError, ModelError, RunError
from sae_persona.features.measure import Measurement
from sae_persona.lab import corpora
from sae_persona.runs import Run, write_json
from sae_persona.sae.formats import load_sae
from sae_persona.sae.recipe import TrainConfig
from sae_persona.sae.train import Diverged
from sae_persona.stages import training
from sae_persona.stages.pipeline import candidates, edits_of, open_ranking, rank_all_stage, rates_at
from sae_persona.stages.training import open_model
from sae_persona.types import HookPoint


def test_rates_are_those_of_the_tokens_that_are_edited(demo_run):
    found = Measurement.load(demo_run)
    dense = found.pooled.pools["pre"].toarray() > 0
    np.testing.assert_allclose(rates_at(found, "pre"), dense.mean(0))
    np.testing.assert_allclose(rates_at(found, "all"), found.stats.firing_rate.numpy())


def test_candidates_rise_with_the_persona(demo_run):
    ranking = open_ranking(demo_run, "cheerful")
    found = candidates(ranking, 3)
    rising = [row.latent for row in ranking if row.direction > 0]
    assert [candidate.latent for candidate in found] == rising[:3]
    with pytest.raises(RunError, match="has no ranking for toxic: run `sae-persona rank"):
        open_ranking(demo_run, "toxic")


def copied(run, path):
    return Run(shutil.copytree(run.path, path / "run"))


def test_a_ranking_given_covariates_lies_beside_the_plain_one(demo_run, tmp_path):
    run, config = copied(demo_run, tmp_path), RankConfig(permutations=19, given=("length", "class_words"))
    made = rank_all_stage(run, ["formal", "cheerful"], config=config)
    assert run.ranking("formal").read_bytes() == demo_run.ranking("formal").read_bytes()
    assert open_ranking(run, "formal").config["given"] == []
    beside = Ranking.load(run.path / "rankings" / "given" / "length,class_words" / "formal.json")
    assert beside == made["formal"] and beside.config["given"] == ["length", "class_words"]
    assert [one.partition(" (")[0] for one in beside.controls] == ["length", "class_words"]
    assert rank_all_stage(run, ["formal"], config=config)["formal"] == made["formal"], "whoever else is named"


def test_of_every_persona_those_with_too_few_examples_are_left_out_and_told(demo_run, tmp_path):
    run, found, config = copied(demo_run, tmp_path), Measurement.load(demo_run), RankConfig(permutations=19)
    before: list[str] = []
    could = set(rank_all_stage(run, None, config=config, found=found, say=before.append))
    assert "formal" in could and len(could) + len(before) == len(found.pooled.personas)
    labels = found.pooled.labels.copy()
    labels[5:, found.pooled.personas.index("formal")] = np.nan
    found.pooled.labels, said = labels, []
    made = rank_all_stage(run, None, config=config, found=found, say=said.append)
    assert set(made) == could - {"formal"}
    (told,) = set(said) - set(before)
    assert told.startswith("left out: 'formal' has ") and "at least 10 of each are needed" in told
    with pytest.raises(DataError, match="'formal' has"):
        rank_all_stage(run, ["cheerful", "formal"], config=config, found=found)
    found.pooled.labels = np.full_like(labels, np.nan)
    with pytest.raises(DataError, match="at least 10 of each are needed"):
        rank_all_stage(run, None, config=config, found=found)


def test_a_persona_in_an_edit_is_its_best_rising_latent(demo_run):
    (edit,) = edits_of(demo_run, ["clamp:cheerful=1.5"])
    best = candidates(open_ranking(demo_run, "cheerful"), 1)[0]
    assert (edit.latent, edit.strength) == (best.latent, 1.5)
    assert edit.unit == pytest.approx(best.unit)


def test_a_model_that_has_changed_since_is_refused(demo_run, tmp_path):
    run = Run.create(tmp_path / "run")
    manifest = demo_run.manifest
    manifest["stages"][0]["model"]["config_hash"] = "0" * 64
    write_json(run.path / "manifest.json", manifest)
    with pytest.raises(ModelError, match="is not the model that .* was made with"):
        open_model(run)


def test_training_that_diverges_keeps_the_last_good_sae_beside_the_run(demo_run, tmp_path, monkeypatch):
    good = load_sae(demo_run.sae)

    def diverge(*args, **kwargs):
        raise Diverged("the loss is inf at step 7", good, "")

    monkeypatch.setattr(training, "train_many", diverge)
    with (
        pytest.raises(RunError, match=r"inf at step 7\. The SAE of the last good step is in .*run\.last_good"),
        Run.making(tmp_path / "run") as run,
    ):
        training.train_stage(
            run,
            load_lm("lab"),
            HookPoint(3),
            list(corpora.corpus(5)),
            streaming=StreamConfig(batch_tokens=64, buffer_tokens=64),
            training=TrainConfig(n_latents=64, k=4),
        )
    assert not (tmp_path / "run").exists()
    torch.testing.assert_close(load_sae(tmp_path / "run.last_good").w_dec, good.w_dec)
