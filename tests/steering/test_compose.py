"""Interference and solved strengths, on an SAE with a latent planted for each of two traits."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_persona.activations.dialogues import Dialogue, tokenize
from sae_persona.activations.harvest import harvest
from sae_persona.errors import ConfigError, DataError
from sae_persona.lab import corpora
from sae_persona.lab.judge import judge
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.bench import Bench, Questions
from sae_persona.steering.compose import ComposeConfig, compose, local_model
from sae_persona.steering.divergence import DivergenceConfig
from sae_persona.steering.interference import Ingredient, Mix, interference
from sae_persona.steering.interventions import Clamp
from sae_persona.steering.solver import Targets
from sae_persona.types import HookPoint

TRAITS = ("formal", "cheerful")
READING = DivergenceConfig(n_tokens=8, n_prompts=8)


@pytest.fixture(scope="module")
def planted(lm):
    """Latent i is the difference of means of trait i; its unit is that difference's length."""
    rows = [Dialogue.from_row(row, "") for row in corpora.labelled(200, "train")]
    tokens = [tokenize(lm, row) for row in rows]
    x = torch.stack([acts[t.answers[-1].pre] for t, acts in harvest(lm, HookPoint(3), tokens, 32)])
    shows = [torch.tensor([row.labels[trait] > 0 for row in rows]) for trait in TRAITS]
    w = torch.stack([x[on].mean(0) - x[~on].mean(0) for on in shows])
    units = w.norm(dim=1)
    w = w / units[:, None]
    sae = SAE(w, torch.zeros(2), w, torch.zeros(lm.d_model), ReLU(), {"hook": "layers.3.resid_post", "model": "lab"})
    return sae, units.tolist()


def bench(lm, sae, part, n=24, rules=judge):
    chats = [row["messages"] for trait in TRAITS for row in corpora.question_rows(trait, n // 2, part)]
    return Bench(lm, sae, rules, Questions.of(lm, part, chats), AnswerConfig(), sae.hook, "pre")


@pytest.fixture(scope="module")
def parts(planted):
    _, units = planted
    return [
        Ingredient(trait=trait, make=lambda s, i=i: [Clamp(i, s, units[i])], strength=1.5)
        for i, trait in enumerate(TRAITS)
    ]


@pytest.fixture(scope="module")
def development(lm, planted, parts):
    return Mix(bench(lm, planted[0], "train"), parts, READING)


@pytest.fixture(scope="module")
def held(lm, planted, parts):
    return Mix(bench(lm, planted[0], "held_out"), parts, READING)


def test_interference_is_the_formulas(held):
    found = interference(held)
    rate = {}
    for name, at in {"nothing": (0, 0), "formal": (1.5, 0), "cheerful": (0, 1.5), "all": (1.5, 1.5)}.items():
        rate[name] = {t: np.mean([judge(q, a.text)[t] for q, a in zip(*asked(held, at), strict=True)]) for t in TRAITS}
    for i, edit in enumerate(TRAITS):
        for j, trait in enumerate(TRAITS):
            own = rate[trait][trait] - rate["nothing"][trait]
            wanted = (rate[edit][trait] - rate["nothing"][trait]) / own
            cell = found.matrix[i][j]
            assert cell.value == pytest.approx(wanted) and cell.low <= cell.value <= cell.high
    for j, trait in enumerate(TRAITS):
        gains = [rate[name][trait] - rate["nothing"][trait] for name in TRAITS]
        error = rate["all"][trait] - rate["nothing"][trait] - sum(gains)
        assert found.composition[j].value == pytest.approx(error)
        assert found.rates[-1][j] == pytest.approx(rate["all"][trait])
        assert found.matrix[j][j] == pytest.approx((1, 1, 1))
    off = [abs(found.matrix[i][1 - i].value) for i in range(2)]
    assert found.mean_off_diagonal == pytest.approx(np.mean(off))
    assert "edit of formal" in str(found)


def asked(mix, at):
    """Questions and answers at these strengths, sampled again."""
    return mix.bench.questions.texts, mix.bench.ask(mix.edits(at))[1]


def test_what_an_edit_that_moves_nothing_does_cannot_be_compared(lm, planted, parts):
    idle = replace(parts[1], make=lambda s: [Clamp(1, 0.0, 1.0)])
    found = interference(Mix(bench(lm, planted[0], "held_out", n=8), [parts[0], idle], READING))
    assert math.isnan(found.matrix[0][1].value) and math.isnan(found.matrix[1][1].value)


def test_the_model_is_measured_about_the_point(development):
    config = ComposeConfig(step=0.4)
    local = local_model(development, TRAITS, development.working, config)
    up, down = ({t: np.nanmean(development.scores(t, (s, 1.5))) for t in TRAITS} for s in (2.1, 0.9))
    assert local.jacobian[:, 0] == pytest.approx([(up[t] - down[t]) / 1.2 for t in TRAITS])
    for at in ([1.5, 0], [0, 1.5], [1.5, 1.5]):
        measured = development.readings(at).kl_mean
        assert local.divergence(np.array(at)) == pytest.approx(measured, rel=1e-6), "it goes through what was measured"


def test_targets_within_reach_are_met(development, held):
    alone = {t: float(np.nanmean(development.scores(t, development.working))) for t in TRAITS}
    assert max(alone.values()) < 0.7, "the edits are in each other's way"
    wanted = Targets(at_least={"formal": 0.8}, at_most={"cheerful": 0.5})
    told = []
    found = compose(development, held, wanted, ComposeConfig(step=0.4), on_round=lambda *a: told.append(a))
    solved = found.solution
    assert solved.verdict == "met" and len(told) == 3
    assert solved.measured["formal"] >= 0.8 - 0.02 and solved.measured["cheerful"] <= 0.5 + 0.02
    assert solved.strengths["cheerful"] < 1.5 and solved.predicted["formal"] >= 0.8 - 1e-3
    met = [strengths for strengths, rates in told if wanted.shortfall(rates) <= 0.02]
    costs = [development.readings(list(strengths.values())).kl_mean for strengths in met]
    assert development.readings(list(solved.strengths.values())).kl_mean == min(costs), "the cheapest of those"
    assert found.readings == held.readings(list(solved.strengths.values()))
    assert set(found.test) == set(TRAITS)
    rates = {trait: rate.value for trait, rate in found.test.items()}
    assert found.shortfall == wanted.shortfall(rates) and found.met == (found.shortfall <= 0.02)
    assert "the targets are met on development questions" in str(found)
    assert ("the targets are met on test questions" in str(found)) == found.met
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["solution"]["strengths"] == solved.strengths


def test_targets_are_judged_on_test_questions(lm, planted, parts, development):
    """A judge that finds nothing in the answers to them."""

    def blind(question, answer):
        return dict.fromkeys(judge(question, answer), 0.0)

    turned = Mix(bench(lm, planted[0], "held_out", rules=blind), parts, READING)
    wanted = Targets(at_least={"formal": 0.3}, at_most={})
    found = compose(development, turned, wanted, ComposeConfig(step=0.4, rounds=1))
    assert found.solution.verdict == "met" and found.met is False
    assert found.shortfall == 0.3
    assert f"not met on test questions: missed by {found.shortfall:.2f}" in str(found)
    assert compose(development, turned).met is None


def test_a_question_is_in_one_part_only(development):
    with pytest.raises(DataError, match="questions are in the development and the test set, the first .*: take them"):
        compose(development, development)


def test_targets_beyond_reach_are_infeasible_with_the_numbers(development, held):
    wanted = Targets(at_least={"formal": 1.0, "deceptive": 1.0}, at_most={})
    solved = compose(development, held, wanted, ComposeConfig(step=0.4, rounds=1)).solution
    assert solved.verdict == "infeasible"
    assert solved.least_shortfall > 0.3 and solved.shortfall > 0.3
    assert solved.reachable["deceptive >= 1"] < 0.7
    assert "no strengths up to the highest miss all targets by less than" in str(solved)
    assert "deceptive >= 1: goes to" in str(solved)


def test_what_cannot_be_composed_is_refused(lm, planted, parts, development):
    for strength in (math.nan, 0.0, -1.0, math.inf):
        with pytest.raises(ConfigError, match="finite strength above 0"):
            replace(parts[0], strength=strength)
    with pytest.raises(ConfigError, match="each trait has one edit"):
        Mix(development.bench, [parts[0], parts[0]], READING)
    with pytest.raises(DataError, match="the judge never scores pirate"):
        development.scores("pirate", (0, 0))
    for bad in ({"step": 0.0}, {"high": 0.5}, {"rounds": 0}, {"tolerance": math.nan}):
        with pytest.raises(ConfigError):
            ComposeConfig(**bad)
