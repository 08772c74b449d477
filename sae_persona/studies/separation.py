"""How well numbers tell two sets apart, with intervals that are honest about what was drawn: prompts, or organisms.

AUROC = P(a positive's number > a negative's), ties half
"""

import math

import numpy as np

from sae_persona.attribution.association import Interval, associate
from sae_persona.attribution.midranks import SortedColumns
from sae_persona.studies.shift import resampled


def wins(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """1 where a positive's number is above a negative's, 0.5 for ties: [n1] and [n0] -> [n1, n0]."""
    return (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)


def auroc(positive: np.ndarray, negative: np.ndarray) -> Interval:
    """AUROC with DeLong's interval, or Newcombe's at 0 and 1; NaN where a set has fewer than two."""
    if min(len(positive), len(negative)) < 2:
        value = float(wins(positive, negative).mean()) if len(positive) and len(negative) else math.nan
        return Interval(value, math.nan, math.nan)
    numbers = np.concatenate([positive, negative])[:, None]
    found = associate(SortedColumns.of(numbers), np.arange(len(numbers)) < len(positive))
    return found.auroc.at(0)


def paired_auroc(base: np.ndarray, tuned: np.ndarray, *, resamples: int, seed: int) -> Interval:
    """AUROC of tuned against base on the same prompts, [n] each; percentiles over prompts drawn with replacement."""
    weights = resampled(len(base), resamples, seed)
    table = wins(tuned, base)
    found = ((weights @ table) * weights).sum(1)
    return Interval(float(table.mean()), *(float(q) for q in np.quantile(found, (0.025, 0.975))))


def auroc_gain(one: np.ndarray, other: np.ndarray, y: np.ndarray, *, resamples: int, seed: int) -> Interval:
    """AUROC of ``one`` minus that of ``other`` on the same things, [n] each, y [n] bool.

    Percentiles over positives and negatives drawn with replacement, each among themselves; both measures see one draw.
    """
    up = resampled(int(y.sum()), resamples, seed)
    down = resampled(int((~y).sum()), resamples, seed + 1)
    tables = [wins(numbers[y], numbers[~y]) for numbers in (one, other)]
    first, second = (((up @ table) * down).sum(1) for table in tables)
    low, high = np.quantile(first - second, (0.025, 0.975))
    return Interval(float(tables[0].mean() - tables[1].mean()), float(low), float(high))


def correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Pearson's and Spearman's correlation over what both say; NaN for fewer than three, or where one does not vary."""
    from scipy.stats import rankdata  # here: importing scipy.stats costs half a second

    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 3 or not (np.ptp(x) and np.ptp(y)):
        return math.nan, math.nan
    return tuple(float(np.corrcoef(a, b)[0, 1]) for a, b in ((x, y), (rankdata(x), rankdata(y))))  # pyright: ignore
