"""How strong an edit was: rates, perplexities and their 95 % intervals over questions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
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
    """
    known = ~np.isnan(scores)
    scores = scores[known]
    if not len(scores):
        return Interval(float("nan"), float("nan"), float("nan"))
    p, z = float(scores.mean()), 1.959964
    n = len(scores) / (1.0 if questions is None else _design_effect(scores, questions[known]))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def perplexity(surprise: np.ndarray) -> float:
    """exp of the mean nats a token."""
    nats, tokens = surprise.sum(axis=0)
    return float(np.exp(nats / max(tokens, 1)))


def _design_effect(scores: np.ndarray, questions: np.ndarray) -> float:
    """Variance of the mean with answers grouped by question, over that of as many independent answers; at least 1."""
    n, p, groups = len(scores), scores.mean(), np.unique(questions)
    if len(groups) == 1:
        return float(n)
    if p in (0.0, 1.0):
        return 1.0
    sums = _by_question((scores - p)[:, None], questions)[:, 0]
    grouped = (sums**2).sum() / n**2 * len(groups) / (len(groups) - 1)
    return max(1.0, float(grouped / (p * (1 - p) / n)))


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


def gain(arm: np.ndarray, base: np.ndarray, questions: np.ndarray | None = None, *, seed: int = 0) -> Interval:
    """Difference of mean scores on the same questions, with a paired bootstrap interval over questions.

    questions   [n] which question each score answers; None: each its own
    """
    both = ~np.isnan(arm) & ~np.isnan(base)
    difference = arm[both] - base[both]
    if not len(difference):
        return Interval(float("nan"), float("nan"), float("nan"))
    counted = np.stack([difference, np.ones_like(difference)], axis=1)
    totals, n = resampled(counted, None if questions is None else questions[both], seed).T
    return Interval(float(difference.mean()), *np.percentile(totals / n, [2.5, 97.5]).tolist())


def cost(arm: np.ndarray, base: np.ndarray, questions: np.ndarray | None = None, *, seed: int = 0) -> Interval:
    """Ratio of perplexities on the same questions, with a paired bootstrap interval over questions.

    arm, base   [n, 2] nats and tokens of each answer
    questions   [n] which question each answers; None: each its own
    """
    nats, tokens, base_nats, base_tokens = resampled(np.concatenate([arm, base], axis=1), questions, seed).T
    ratios = np.exp(nats / np.maximum(tokens, 1) - base_nats / np.maximum(base_tokens, 1))
    return Interval(perplexity(arm) / perplexity(base), *np.percentile(ratios, [2.5, 97.5]).tolist())
