import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from torch import tensor

from sae_persona.attribution.tables import shown
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
    got = cost(np.tile(few, (3, 1)), np.tile(many, (3, 1)))
    assert got.low < got.value < got.high


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


def covers(rate, scores, asked):
    found = wilson(scores, asked)
    return found.low <= rate <= found.high


@pytest.mark.parametrize("n", [5, 8, 15, 40])
@pytest.mark.parametrize("answers", [1, 4])
def test_the_interval_covers_the_rate_where_answers_to_a_question_are_alike(n, answers):
    """Exactly: what is seen is a binomial number of questions."""
    asked = np.repeat(np.arange(n), answers)
    for rate in (0.05, 0.2, 0.5, 0.9):
        covered = [covers(rate, (asked < k).astype(float), asked) for k in range(n + 1)]
        assert binom.pmf(np.arange(n + 1), n, rate) @ covered >= 0.93, rate


@pytest.mark.parametrize("n", [5, 15, 40])
@pytest.mark.parametrize(("answers", "alike"), [(12, 0.6), (6, 0.2)])
def test_the_interval_covers_the_rate_over_beta_binomial_questions(n, answers, alike):
    """``alike`` is the correlation of two answers to one question."""
    asked, spread, rng = np.repeat(np.arange(n), answers), (1 - alike) / alike, np.random.default_rng(n)
    for rate in (0.05, 0.5, 0.9):
        own = rng.beta(rate * spread, (1 - rate) * spread, (1000, n))
        scores = (rng.random((1000, n * answers)) < own.repeat(answers, axis=1)).astype(float)
        assert np.mean([covers(rate, row, asked) for row in scores]) >= 0.93, rate


def test_few_questions_have_no_interval():
    asked = np.repeat(np.arange(4), 6)
    scores = np.tile([1.0, 0.0], 12)
    one = wilson(scores, asked)
    assert one.value == 0.5 and math.isnan(one.low) and math.isnan(one.high)
    assert shown(one, 2) == "0.50 [-]"
    for paired in (gain(scores, np.zeros(24), asked), cost(np.ones((24, 2)), np.ones((24, 2)), asked)):
        assert paired.value in (0.5, 1.0) and math.isnan(paired.low) and math.isnan(paired.high)
    assert wilson(scores, np.repeat(np.arange(6), 4)).low > 0


def test_rates_of_none_and_all_know_the_questions_only():
    """Twelve answers to each of six questions, all alike: no narrower than six answers."""
    asked = np.repeat(np.arange(6), 12)
    for score in (0.0, 1.0):
        many, few = wilson(np.full(72, score), asked), wilson(np.full(6, score), np.arange(6))
        assert many.high - many.low > 0.85 * (few.high - few.low) > 0.4


def test_paired_intervals_of_few_questions_cover():
    rng, n = np.random.default_rng(0), 300
    asked = np.repeat(np.arange(6), 3)
    found = [gain(np.repeat(rng.standard_normal(6), 3), np.zeros(18), asked, seed=i) for i in range(n)]
    assert sum(one.low <= 0 <= one.high for one in found) / n >= 0.91


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
