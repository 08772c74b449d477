"""Counts of dead latents and of firing rates by decade."""

import json
import re

import pytest
import torch

from sae_persona.features.stats import LatentStats
from sae_persona.report.firing import Decade, FiringReport, firing_chart


def stats(fired, n_tokens):
    found = LatentStats(len(fired))
    found.fired, found.n_tokens = torch.tensor(fired), n_tokens
    return found


def test_statistics_tell_of_firing_rates():
    report = FiringReport.of_stats(stats([0, 0, 1, 9, 10, 1000, 10_000], 10_000), dead_after=5000)
    assert (report.never_fired, report.dead) == (2, 2)
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
        FiringReport.of_stats(stats([0, 0, 1, 9, 10, 1000, 10_000], 10_000), dead_after=5000),
        FiringReport.of_stats(stats([0, 0], 10)),
        FiringReport.of_stats(stats([64] * 3, 64), dead_after=1),
    ],
    ids=["some fired", "none fired", "all fired"],
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
    text = str(FiringReport.of_stats(stats([0, 0, 1, 9, 10, 1000, 10_000], 10_000), dead_after=5000))
    assert text.splitlines()[0] == (
        "7 latents, 10000 tokens: 2 never fired, 2 dead (28.6%: silent for 5000 tokens or more)"
    )
    assert re.search(r"^  10⁻⁴ to 10⁻³ +2 +28.6%$", text, re.MULTILINE)
