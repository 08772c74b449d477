"""Counts of dead latents and of firing rates by decade."""

import json
import re

import pytest
import torch

from sae_persona.features.stats import LatentStats
from sae_persona.report.firing import RATE, SILENCE, Decade, FiringReport, firing_chart
from sae_persona.sae.plain_step import PlainStep
from sae_persona.sae.sparsity import TopK
from sae_persona.sae.step import Weights
from sae_persona.types import SparseLatents

SILENT = torch.tensor([0, 0, 9, 10, 99, 100, 640, 5000, 5000])


def stats(fired, n_tokens):
    found = LatentStats(len(fired))
    found.fired, found.n_tokens = torch.tensor(fired), n_tokens
    return found


def test_a_step_tells_of_dead_latents_and_of_silence():
    report = FiringReport.of_step(SILENT, dead_after=100, n_tokens=5000)
    assert (report.never_fired, report.dead, report.dead_share, report.fired_last) == (2, 4, 4 / 9, 2)
    assert report.measure == SILENCE
    assert report.decades == (Decade(1, 10, 1), Decade(10, 100, 2), Decade(100, 1000, 2))


def test_statistics_tell_of_firing_rates():
    report = FiringReport.of_stats(stats([0, 0, 1, 9, 10, 1000, 10_000], 10_000), dead_after=5000)
    assert report.measure == RATE and (report.never_fired, report.dead) == (2, 2)
    # a decade has its lower end; 1 is in the last
    assert report.decades == (Decade(1e-4, 1e-3, 2), Decade(1e-3, 1e-2, 1), Decade(1e-2, 1e-1, 0), Decade(1e-1, 1, 2))


@pytest.mark.parametrize("dead_after", [None, 10_001])
def test_fewer_tokens_than_dead_after_leave_it_unknown_who_is_dead(dead_after):
    report = FiringReport.of_stats(stats([0, 4], 10_000), dead_after=dead_after)
    assert report.dead is None and report.dead_share is None and "dead" not in str(report)


@pytest.mark.parametrize("e", range(-9, 0))
def test_a_round_rate_begins_its_decade(e):
    (decade,) = FiringReport.of_stats(stats([1], 10**-e)).decades
    assert decade.low == float(f"1e{e}")


@pytest.mark.parametrize(
    "report",
    [
        FiringReport.of_step(SILENT, dead_after=100, n_tokens=5000),
        FiringReport.of_stats(stats([0, 0, 1, 9, 10, 1000, 10_000], 10_000), dead_after=5000),
        FiringReport.of_stats(stats([0, 0], 10)),
        FiringReport.of_step(torch.zeros(3, dtype=torch.int64), dead_after=1, n_tokens=64),
    ],
    ids=["step", "statistics", "none fired", "all fired"],
)
def test_text_and_chart_hold_every_latent_once(report):
    assert sum(n for _, n in report.rows) == report.n_latents
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(report.rows)
    assert sum(int(line.split()[-2]) for line in lines[2:]) == report.n_latents
    drawn = firing_chart(report)
    titles = [int(n) for n in re.findall(r"<title>[^<]*: (\d+) latents", drawn)]
    assert sum(titles) == report.n_latents and "nan" not in drawn
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["never_fired"] == report.never_fired


def test_text_says_what_was_found():
    text = str(FiringReport.of_step(SILENT, dead_after=100, n_tokens=5000))
    assert text.splitlines()[0] == (
        "9 latents, 5000 tokens: 2 never fired, 4 dead (44.4%: silent for 100 tokens or more)"
    )
    assert re.search(r"^  100 to 1000 +2 +22.2%$", text, re.MULTILINE)


def test_both_sources_agree_on_a_run():
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(200, 16, generator=g), dim=1)
    weights = Weights(rows.clone(), torch.zeros(200), rows, torch.zeros(16))
    weights.b_enc[:50] = -1e3
    step, counted = PlainStep(weights, TopK(2), k_aux=0, auxk_coef=0.0, dead_after=64), LatentStats(200)
    for _ in range(4):
        x = torch.randn(32, 16, generator=g)
        found: SparseLatents = TopK(2).select(x @ weights.w_enc.T + weights.b_enc)
        step(x, 0.0)
        counted.update(found)
    trained = FiringReport.of_step(step.silent, dead_after=64, n_tokens=128)
    measured = FiringReport.of_stats(counted)
    assert trained.never_fired == measured.never_fired >= 50
    assert trained.dead == int(step.dead.sum()) > trained.never_fired
