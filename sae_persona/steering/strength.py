"""How strong an edit was: rates, perplexities and their 95 % intervals over questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sae_persona.attribution.association import Interval

Judge = Callable[[str, str], dict[str, float | None]]
"""(question, answer) -> score of each trait in [0, 1], None where the question cannot show it. ``valid`` is whether
the answer is one at all."""

RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one arm wrote on n questions.

    scores    trait -> [n] fp64, NaN where the judge says None
    surprise  [n, 2] nats and tokens of each answer under the unsteered model, given the plain prompt
    """

    scores: dict[str, np.ndarray]
    surprise: np.ndarray

    @classmethod
    def of(cls, judge: Judge, questions: Sequence[str], answers: Sequence[str], surprise: Tensor) -> "Outcome":
        """Have the judge read every answer."""
        rows = [judge(question, text) for question, text in zip(questions, answers, strict=True)]
        traits = {trait for row in rows for trait in row}
        scores = {t: np.array([np.nan if row.get(t) is None else row[t] for row in rows], np.float64) for t in traits}
        return cls(scores, surprise.numpy())


def wilson(scores: np.ndarray) -> Interval:
    """Mean of scores in [0, 1] with Wilson's interval for a rate; NaN scores are left out."""
    known = scores[~np.isnan(scores)]
    n = len(known)
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    p, z = float(known.mean()), 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def perplexity(surprise: np.ndarray) -> float:
    """exp of the mean nats a token."""
    nats, tokens = surprise.sum(axis=0)
    return float(np.exp(nats / max(tokens, 1)))


def _resamples(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))


def gain(arm: np.ndarray, base: np.ndarray, *, seed: int = 0) -> Interval:
    """Difference of mean scores on the same questions, with a paired bootstrap interval over questions."""
    both = ~np.isnan(arm) & ~np.isnan(base)
    difference = arm[both] - base[both]
    if not len(difference):
        return Interval(float("nan"), float("nan"), float("nan"))
    means = difference[_resamples(len(difference), seed)].mean(axis=1)
    return Interval(float(difference.mean()), *np.percentile(means, [2.5, 97.5]).tolist())


def cost(arm: np.ndarray, base: np.ndarray, *, seed: int = 0) -> Interval:
    """Ratio of perplexities on the same questions, with a paired bootstrap interval over questions."""
    picks = _resamples(len(arm), seed)
    (nats, tokens), (base_nats, base_tokens) = (part[picks].sum(axis=1).T for part in (arm, base))
    ratios = np.exp(nats / np.maximum(tokens, 1) - base_nats / np.maximum(base_tokens, 1))
    return Interval(perplexity(arm) / perplexity(base), *np.percentile(ratios, [2.5, 97.5]).tolist())
