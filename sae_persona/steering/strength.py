"""How strong an edit was: rates, perplexities and their 95 % intervals over questions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from scipy.special import ndtr, stdtrit
from torch import Tensor

from sae_persona.attribution.association import Interval

Judge = Callable[[str, str], dict[str, float | None]]
"""(question, answer) -> score of each trait in [0, 1], None where the question cannot show it. ``valid`` is whether
the answer is one at all, ``instruction`` how far it does what was asked, ``fluency`` how well it reads. NaN is what the
judge could not say."""
QUALITIES = ("valid", "instruction", "fluency")
"""What a judge may say of an answer that is no trait."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A judge that reads many answers at once faster than one after another."""

    def ahead(self, questions: Sequence[str], answers: Sequence[str]) -> None:
        """Read them all, so that calls find what was read."""
        ...


RESAMPLES = 1000
FEWEST_QUESTIONS = 5
"""Below it intervals over questions are not known."""
PRIOR = 0.2
"""Weight of a question that shows a trait always, and of one that never does, where the design effect is estimated."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one arm wrote on n questions.

    scores    trait -> [n] fp64, NaN where the judge says None or could not say
    surprise  [n, 2] nats and tokens of each answer under the unsteered model, given the plain prompt
    unread    answers of which the judge could not say something
    """

    scores: dict[str, np.ndarray]
    surprise: np.ndarray
    unread: int = 0

    @classmethod
    def of(cls, judge: Judge, questions: Sequence[str], answers: Sequence[str], surprise: Tensor) -> "Outcome":
        """Have the judge read every answer."""
        reader: object = judge
        if isinstance(reader, ReadsAhead):
            reader.ahead(questions, answers)
        rows = [judge(question, text) for question, text in zip(questions, answers, strict=True)]
        traits = {trait for row in rows for trait in row}
        scores = {t: np.array([np.nan if row.get(t) is None else row[t] for row in rows], np.float64) for t in traits}
        unread = sum(any(mark is not None and math.isnan(mark) for mark in row.values()) for row in rows)
        return cls(scores, surprise.numpy(), unread)

    def steering_score(self, trait: str) -> np.ndarray | None:
        """Of each answer, `harmonic_mean` of concept, instruction and fluency; None if the judge gives no such marks.

        The AxBench score (2501.17148): each mark lies between 0 and 2, the trait's is twice its score.
        """
        parts = (trait, "instruction", "fluency")
        if any(part not in self.scores for part in parts):
            return None
        return harmonic_mean(2 * np.stack([self.scores[part] for part in parts], axis=1))


def harmonic_mean(marks: np.ndarray) -> np.ndarray:
    """Of each row of marks [n, m]: 0 where one is 0, NaN where one is not known."""
    with np.errstate(divide="ignore"):
        return marks.shape[1] / (1 / marks).sum(axis=1)


def wilson(scores: np.ndarray, questions: np.ndarray | None = None) -> Interval:
    """Mean of scores in [0, 1] with Wilson's interval for a rate; NaN scores are left out.

    questions   [n] which question each score answers: answers to one question count for less than as many questions
                would, by the design effect (Kish, Survey Sampling, 1965). None: each its own

    The interval is over questions, so its quantile is Student's with one degree of freedom less than there are
    questions, which is to Wilson's formula what Korn and Graubard do to the number of answers (Survey Methodology 24,
    1998). Below `FEWEST_QUESTIONS` its ends are NaN: nothing tells how questions differ.
    """
    known = ~np.isnan(scores)
    scores = scores[known]
    if not len(scores):
        return Interval(math.nan, math.nan, math.nan)
    p, sizes = float(scores.mean()), np.ones(len(scores))
    n_effective = float(len(scores))
    if questions is not None:
        _, group, sizes = np.unique(questions[known], return_inverse=True, return_counts=True)
        n_effective /= _design_effect(scores, group, sizes)
    if len(sizes) < FEWEST_QUESTIONS:
        return Interval(p, math.nan, math.nan)
    z = 1.959964 if questions is None else float(stdtrit(len(sizes) - 1, 0.975))
    n = n_effective
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def perplexity(surprise: np.ndarray) -> float:
    """exp of the mean nats a token."""
    nats, tokens = surprise.sum(axis=0)
    return float(np.exp(nats / max(tokens, 1)))


def _design_effect(scores: np.ndarray, group: np.ndarray, sizes: np.ndarray) -> float:
    """Variance of the mean with answers grouped by question, over that of as many independent answers.

    group   [n] number of the question of each score, of questions with ``sizes`` [groups] answers

    At least 1, at most what it is where all answers to a question are alike. Questions that happen to agree, as at
    rates of 0 and 1 they must, would tell of no difference between them; so two more of typical size are counted with
    a weight of `PRIOR`, one of which always shows the trait and one never.
    """
    n, typical = len(scores), len(scores) / len(sizes)
    total = n + 2 * PRIOR * typical
    p = (scores.sum() + PRIOR * typical) / total
    off = np.bincount(group, scores - p)
    squares = (off**2).sum() + PRIOR * typical**2 * ((1 - p) ** 2 + p**2)
    n_groups = len(sizes) + 2 * PRIOR
    grouped = squares / total**2 * n_groups / (n_groups - 1)
    effect = grouped / (p * (1 - p) / total)
    return float(min(max(1.0, effect), (sizes**2).sum() / n))


def _by_question(values: np.ndarray, questions: np.ndarray | None) -> np.ndarray:
    """Sums of values [n, m] over the answers to each question."""
    if questions is None:
        return values
    _, group = np.unique(questions, return_inverse=True)
    sums = np.zeros((group.max() + 1, values.shape[1]))
    np.add.at(sums, group, values)
    return sums


def resampled(values: np.ndarray, questions: np.ndarray | None, seed: int) -> np.ndarray:
    """Totals of values [n, m] in bootstrap samples of whole questions: [RESAMPLES, m]."""
    sums = _by_question(values, questions)
    picks = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    return sums[picks].sum(axis=1)


def bounds(samples: np.ndarray, n_questions: int) -> tuple[float, float]:
    """The 95 % interval that bootstrap samples over questions tell; NaN where there are too few questions.

    Percentiles as far out as Student's quantile is with so many questions (Hesterberg, What Teachers Should Know about
    the Bootstrap, 2015, section 3.2): those of the normal one are too narrow for few.
    """
    if n_questions < FEWEST_QUESTIONS:
        return math.nan, math.nan
    tail = float(ndtr(-math.sqrt(n_questions / (n_questions - 1)) * stdtrit(n_questions - 1, 0.975)))
    low, high = np.nanpercentile(samples, [100 * tail, 100 * (1 - tail)])
    return float(low), float(high)


def gain(arm: np.ndarray, base: np.ndarray, questions: np.ndarray | None = None, *, seed: int = 0) -> Interval:
    """Difference of mean scores on the same questions, with a paired bootstrap interval over questions.

    questions   [n] which question each score answers; None: each its own

    The ends are NaN where the questions are too few, see `bounds`.
    """
    both = ~np.isnan(arm) & ~np.isnan(base)
    difference = arm[both] - base[both]
    if not len(difference):
        return Interval(float("nan"), float("nan"), float("nan"))
    counted = np.stack([difference, np.ones_like(difference)], axis=1)
    asked = None if questions is None else questions[both]
    totals, n = resampled(counted, asked, seed).T
    return Interval(float(difference.mean()), *bounds(totals / n, _count(difference, asked)))


def cost(arm: np.ndarray, base: np.ndarray, questions: np.ndarray | None = None, *, seed: int = 0) -> Interval:
    """Ratio of perplexities on the same questions, with a paired bootstrap interval over questions.

    arm, base   [n, 2] nats and tokens of each answer
    questions   [n] which question each answers; None: each its own
    """
    nats, tokens, base_nats, base_tokens = resampled(np.concatenate([arm, base], axis=1), questions, seed).T
    ratios = np.exp(nats / np.maximum(tokens, 1) - base_nats / np.maximum(base_tokens, 1))
    return Interval(perplexity(arm) / perplexity(base), *bounds(ratios, _count(arm, questions)))


def _count(values: np.ndarray, questions: np.ndarray | None) -> int:
    """Different questions that values [n, ...] answer."""
    return len(values) if questions is None else len(np.unique(questions))
