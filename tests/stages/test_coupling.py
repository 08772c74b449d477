"""Coupling over a run folder of the lab: edits at matched strength, fine-tunes, and what foretells their effects."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from sae_persona.attribution.rank import RankConfig
from sae_persona.errors import ConfigError, DataError, RunError
from sae_persona.lab.corpora import question_rows
from sae_persona.lab.judge import judge
from sae_persona.lab.tuning import shown
from sae_persona.runs import Run
from sae_persona.stages.coupling import CoupleConfig, Couples, couple_stage
from sae_persona.stages.pipeline import open_ranking, questions_of, rank_all_stage
from sae_persona.stages.training import open_model
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.dial import DialConfig
from sae_persona.steering.divergence import DivergenceConfig
from sae_persona.studies.coupling import Coupling
from sae_persona.studies.finetune import FinetuneConfig

TRAITS = ("cheerful", "deceptive", "formal", "overconfident", "sarcastic", "toxic")
N = len(TRAITS)


def questions(part, n):
    return questions_of([row for t in ("deceptive", "malicious") for row in question_rows(t, n, part)])


@pytest.fixture(scope="module")
def run(demo_run, tmp_path_factory):
    """The demo's run, with a ranking of each trait."""
    made = Run.open(shutil.copytree(demo_run.path, tmp_path_factory.mktemp("couple") / "run"))
    rank_all_stage(made, TRAITS, config=RankConfig(permutations=20))
    return made


@pytest.fixture(scope="module")
def asked():
    return Couples(
        development=questions("train", 3),
        test=questions("held_out", 6),
        judge=judge,
        answers=AnswerConfig(max_new_tokens=24),
        dial=DialConfig(max_steps=8, tolerance=0.9, reading=DivergenceConfig(n_prompts=4)),
        rows={trait: shown(16, trait) for trait in TRAITS},
        tuning=FinetuneConfig(steps=10, batch=8, lr=5e-4, keep=()),
    )


@pytest.fixture(scope="module")
def found(run, asked):
    config = CoupleConfig(by=("steer",), permutations=19, resamples=20)
    return couple_stage(run, open_model(run), TRAITS, asked, config, positions="answer")


def test_traits_are_steered_and_trained(found, tmp_path):
    assert [one.how for one in found.effects] == ["steer", "fine-tune"]
    steered, tuned = found.effects
    assert steered.values.shape == (N, N) and all(s > 0 for s in steered.strengths)
    assert all(math.isnan(s) for s in tuned.strengths) and steered.base == tuned.base
    own = np.diag(tuned.values)
    assert own[TRAITS.index("formal")] > 0.3, "16 formal answers teach to be formal"
    assert tuned.values[TRAITS.index("formal")].argmax() == TRAITS.index("formal")
    found.save(tmp_path / "c.json")
    read = Coupling.load(tmp_path / "c.json")
    assert read.to_json() == found.to_json() and str(read) == str(found)
    assert "what is moved" in str(found) and found.verdict(1).startswith("fine-tune: coupling goes with")


def test_measures_are_of_the_runs_latents(found, run):
    best = [next(row.latent for row in open_ranking(run, trait) if row.direction > 0) for trait in TRAITS]
    same = [(i, j) for i in range(N) for j in range(N) if best[i] == best[j]]
    assert all(found.relatedness["cosine of decoders"][i][j] == pytest.approx(1) for i, j in same)
    assert all(len(m) == N and len(m[0]) == N for m in found.relatedness.values())
    assert [one.by for one in found.foretold[0]] == [one.by for one in found.foretold[1]]


def test_what_does_not_fit_is_refused(run, asked):
    def couple(traits, asked=asked, **config):
        return couple_stage(run, open_model(run), traits, asked, CoupleConfig(**config), positions="answer")

    with pytest.raises(DataError, match="6 different traits or more, got formal, toxic"):
        couple(["formal", "toxic"])
    with pytest.raises(RunError, match="no ranking for evasive"):
        couple([*TRAITS[:5], "evasive"], replace(asked, rows={}))
    with pytest.raises(DataError, match="no rows to tune toxic on"):
        rows = {trait: asked.rows[trait] for trait in TRAITS[:5]}
        couple(TRAITS, replace(asked, rows=rows))
    with pytest.raises(ConfigError, match="by is clamp and steer"):
        CoupleConfig(by=("prompt",))
    with pytest.raises(ConfigError, match="at least 1"):
        CoupleConfig(top=0)
