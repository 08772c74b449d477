"""What the report says in words, when the latent does better and when it does worse."""

import math
from dataclasses import replace

import pytest

from sae_persona.report.verdict import about_ranking, about_sweep, headline


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        (0.9, "It falls short of the difference of means at equal cost: 60 % against 90 %."),
        (
            0.65,
            "falls short of the difference of means at equal cost: 60 % against 65 %, though the intervals overlap.",
        ),
        (0.6, "It reaches what the difference of means does at equal cost: 60 %"),
        (0.2, "It does better than the difference of means at equal cost: 60 % against 20 %."),
    ],
)
def test_beside_the_difference_of_means(make_sweep, dense, said):
    assert said in " ".join(about_sweep(make_sweep(dense))).replace("\N{NO-BREAK SPACE}", " ")


def test_headline_counts_personas(make_sweep):
    good, bad = make_sweep(0.2), replace(make_sweep(0.9), persona="clerk")
    assert headline([], [good, bad]) == [
        "Clamping one latent raises the judged rate of all 2 personas, "
        "and by more than any random latent of like firing rate moves it.",
        "It falls short of the difference of means at equal cost for 1 of 2 personas (clerk).",
    ]
    assert headline([], []) == []


def _with(swept, kind, **changes):
    arms = (replace(arm, **changes) if arm.kind == kind and arm.part == "test" else arm for arm in swept.arms)
    return replace(swept, arms=tuple(arms))


def test_says_that_a_random_latent_does_as_much(make_sweep, interval):
    swept = _with(make_sweep(), "random", gain=interval(-0.6))
    assert "A random latent moves it as much or more (−60 points)." in about_sweep(swept)
    assert "raises no judged rate" in headline([], [swept])[0]


def test_says_that_nothing_moved_or_cost_too_much(make_sweep, interval):
    assert "That gain's interval includes zero." in about_sweep(_with(make_sweep(), "latent", gain=interval(0.01)))
    dear = " ".join(about_sweep(_with(make_sweep(), "latent", cost=interval(3.0))))
    assert "more than the 1.5× that a strength was meant to cost" in dear


def test_few_questions_make_no_claim_certain(make_sweep):
    def endless(interval):
        return interval._replace(low=math.nan, high=math.nan)

    swept = make_sweep()
    arms = [replace(arm, gain=endless(arm.gain), rate=endless(arm.rate), n_questions=3) for arm in swept.arms]
    said = about_sweep(replace(swept, arms=tuple(arms)))
    assert "So few questions (3) do not tell whether that is chance." in said
    assert any(line.endswith("by too few questions to be certain.") for line in said)
    assert "raises no judged rate" in headline([], [replace(swept, arms=tuple(arms))])[0]


def test_ranking_beside_the_dense_direction(ranking):
    told = " ".join(about_ranking(ranking, ranking[0]))
    assert "Latent 3 tells the persona: AUROC 0.875" in told
    assert "it falls short of the difference of means (0.980)." in told
    assert "does not tell for certain" in about_ranking(ranking, ranking[2])[0]
    assert about_ranking(ranking, None) == []


def test_says_that_the_wrong_sign_does_it_or_answers_are_broken(make_sweep, interval):
    swept = make_sweep()
    assert not any("wrong sign" in said or "valid" in said for said in about_sweep(swept))
    turned = _with(swept, "wrong sign", gain=interval(0.3))
    assert "With the wrong sign it raises the rate, too (+30 points)." in about_sweep(turned)
    broken = replace(_with(swept, "latent", valid=interval(0.4)), config={"min_valid": 0.75, "max_cost": 1.5})
    plain = [said.replace("\N{NO-BREAK SPACE}", " ") for said in about_sweep(broken)]
    assert "Only 40 % of the answers are valid; 75 % were meant to be." in plain
