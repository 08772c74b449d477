import math

import numpy as np
import pytest
from scipy.stats import binomtest
from torch import tensor

from sae_persona.steering.strength import Outcome, cost, gain, harmonic_mean, perplexity, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 20), (20, 20), (57, 120)])
def test_wilson_is_scipys(k, n):
    wanted = binomtest(k, n).proportion_ci(method="wilson")
    got = wilson(np.array([1.0] * k + [0.0] * (n - k)))
    assert got == pytest.approx((k / n, wanted.low, wanted.high), abs=1e-6)


def test_scores_that_are_not_known_are_left_out():
    assert wilson(np.array([1.0, np.nan, 0.0])).value == 0.5
    assert math.isnan(wilson(np.array([np.nan])).value)
    assert gain(np.array([1.0, np.nan, 1.0]), np.array([0.0, 0.0, np.nan])).value == 1.0
    assert math.isnan(gain(np.array([np.nan]), np.array([0.0])).value)


def test_the_gain_is_paired_by_question():
    """Questions differ far more than arms do: only pairing sees the effect."""
    rng = np.random.default_rng(0)
    base = rng.random(200)
    interval = gain(base + 0.05 + 0.01 * rng.standard_normal(200), base)
    assert 0.045 < interval.low < interval.value < interval.high < 0.055


def test_perplexity_weighs_tokens_and_cost_is_its_ratio():
    few, many = np.array([[2.0, 2.0], [9.0, 3.0]]), np.array([[1.0, 2.0], [4.0, 3.0]])
    assert perplexity(few) == pytest.approx(math.exp(11 / 5))
    got = cost(few, many)
    assert got.value == pytest.approx(math.exp(11 / 5 - 5 / 5))
    assert got.low <= got.value <= got.high


def test_the_cost_of_nothing_is_one():
    same = np.random.default_rng(0).random((50, 2)) + 1
    assert cost(same, same) == pytest.approx((1.0, 1.0, 1.0))


def test_an_outcome_reads_every_answer():
    outcome = Outcome.of(
        lambda q, a: {"loud": float(a.isupper()), "asked": None if q == "?" else 1.0},
        ["?", "what"],
        ["YES", "no"],
        tensor([[1.0, 2.0], [3.0, 4.0]]),
    )
    assert outcome.scores["loud"].tolist() == [1.0, 0.0]
    assert np.isnan(outcome.scores["asked"]).tolist() == [True, False]
    assert outcome.surprise.shape == (2, 2)


def test_answers_to_one_question_do_not_count_as_many():
    """Six questions, each asked fifty times, half of them always answered one way: the intervals know six."""
    questions = np.repeat(np.arange(6), 50)
    scores = np.repeat([1.0, 1, 1, 0, 0, 0], 50)
    few = wilson(np.array([1.0, 1, 1, 0, 0, 0]))
    assert wilson(scores, questions) == pytest.approx(few, abs=0.06)
    assert wilson(scores).high - wilson(scores).low < 0.12
    paired = gain(scores, np.zeros(300), questions)
    assert paired.high - paired.low > 0.5
    assert wilson(scores[:50], questions[:50]).low == pytest.approx(wilson(np.ones(1)).low)


def test_different_questions_leave_the_intervals_as_they_are():
    rng = np.random.default_rng(0)
    scores, base = rng.integers(2, size=80).astype(float), np.zeros(80)
    assert gain(scores, base, np.arange(80)) == gain(scores, base)
    assert wilson(scores, np.arange(80)) == pytest.approx(wilson(scores), abs=0.01)


def test_the_score_is_the_harmonic_mean_and_0_if_a_mark_is():
    marks = np.array([[2.0, 2, 2], [1, 2, 2], [0, 2, 2], [np.nan, 2, 2]])
    assert harmonic_mean(marks) == pytest.approx([2, 1.5, 0, np.nan], nan_ok=True)
    without = Outcome.of(lambda q, a: {"loud": 1.0}, ["?"], ["a"], tensor([[1.0, 1.0]]))
    assert without.steering_score("loud") is None and without.unread == 0
