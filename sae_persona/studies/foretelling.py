"""Whether a matrix over ordered pairs of traits is foretold by others, out of sample.

A pair (i, j) is foretold from pairs in which neither i nor j takes part, as source or as target: a line through them,
or a plane through several measures. Beside it stands what knows j: the mean of its column without i and j, the best
guess of somebody who knows how easily j is moved and nothing about i.

    R2         1 - sum (e - foretold)^2 / sum (e - mean)^2, of the pairs that it was foretold from; below 0: worse
               than that mean
    Spearman   of what is foretold (of one measure: of the measure itself) and e
    p          of the latter: traits are relabelled in the one matrix, rows and columns together, and not in the other
               (Mantel 1967), so that the pairs of one trait stay together; one-sided

Intervals are over traits, drawn with replacement: pairs that share a trait are no independent observations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sae_persona.attribution.association import Interval
from sae_persona.errors import DataError

FEWEST = 6
"""Traits, so that a pair leaves others to learn from, of which a column has another row."""
COLUMN, ALL = "mean of j's column", "all measures"
_RIDGE = 1e-3  # of standardised measures, beside their sum of squares: two of them may be the same


@dataclass(frozen=True)
class Foretold:
    """How well one measure, or several, foretell the matrix."""

    by: str
    spearman: Interval
    p: float
    """NaN of a mean and of several measures."""
    r2: Interval
    n: int
    """Ordered pairs."""


def foretell(
    effects: np.ndarray,
    measures: Mapping[str, np.ndarray],
    *,
    permutations: int = 999,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Foretold]:
    """effects and each measure [n, n]; diagonals and pairs with a NaN are left out. DataError for too few traits.

    Of each measure alone, of all together, of the column's mean, and of that with all of them.
    """
    n = len(effects)
    if n < FEWEST:
        raise DataError(f"coupling is foretold over {FEWEST} traits or more, got {n}")
    known = {name: m for name, m in measures.items() if np.isfinite(m[~np.eye(n, dtype=bool)]).all()}
    found = []
    for name, measure in known.items():
        guess = out_of_sample(effects, [measure])
        p = mantel(measure, effects, permutations=permutations, seed=seed)
        found.append(_score(name, effects, guess, measure, p, resamples, seed))
    if len(known) > 1:
        guess = out_of_sample(effects, list(known.values()))
        found.append(_score(ALL, effects, guess, guess, math.nan, resamples, seed))
    column = column_means(effects)
    found.append(_score(COLUMN, effects, column, column, math.nan, resamples, seed))
    if known:
        guess = out_of_sample(effects, list(known.values()), with_column=True)
        found.append(_score(f"{COLUMN} and {ALL}", effects, guess, guess, math.nan, resamples, seed))
    return found


def _free(n: int, *taken: int) -> np.ndarray:
    """Which pairs are off the diagonal and have none of these traits: [n, n] bool."""
    mask = ~np.eye(n, dtype=bool)
    mask[list(taken)], mask[:, list(taken)] = False, False
    return mask


def column_means(effects: np.ndarray) -> np.ndarray:
    """Of each pair (i, j) the mean of e_aj over a that are neither: [n, n]."""
    n = len(effects)
    found = np.full((n, n), np.nan)
    for i, j in zip(*np.nonzero(_free(n)), strict=True):
        others = np.delete(effects[:, j], [i, j])
        others = others[np.isfinite(others)]
        found[i, j] = others.mean() if len(others) else np.nan
    return found


def out_of_sample(effects: np.ndarray, measures: Sequence[np.ndarray], *, with_column: bool = False) -> np.ndarray:
    """What a least-squares plane through the pairs without i and j says of (i, j): [n, n], NaN on the diagonal.

    with_column   the column's mean is a measure, too: that of the pairs that are learned from is without i and j
    """
    n = len(effects)
    found = np.full((n, n), np.nan)
    for i, j in zip(*np.nonzero(_free(n)), strict=True):
        learn = _free(n, i, j) & np.isfinite(effects)
        inputs = [(m[learn], float(m[i, j])) for m in measures]
        if with_column:
            rest = effects.copy()
            rest[[i, j]] = np.nan
            inputs.append((column_means(rest)[learn], float(np.nanmean(rest[:, j]))))
        x, here = np.column_stack([one for one, _ in inputs]), np.array([value for _, value in inputs])
        found[i, j] = _plane(x, effects[learn], here)
    return found


def _plane(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> float:
    centre, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 0, spread, np.inf)
    z = (x - centre) / spread
    slopes = np.linalg.solve(z.T @ z + _RIDGE * len(z) * np.eye(z.shape[1]), z.T @ (y - y.mean()))
    return float(y.mean() + (at - centre) / spread @ slopes)


def _score(
    by: str, effects: np.ndarray, guess: np.ndarray, order: np.ndarray, p: float, resamples: int, seed: int
) -> Foretold:
    n = len(effects)
    plain = np.full((n, n), np.nan)
    for i, j in zip(*np.nonzero(_free(n)), strict=True):
        plain[i, j] = np.nanmean(effects[_free(n, i, j)])
    pairs = _free(n) & np.isfinite(effects)
    generator, drawn = np.random.default_rng(seed), []
    for _ in range(resamples):
        traits = generator.integers(n, size=n)
        a, b = np.meshgrid(traits, traits, indexing="ij")
        keep = pairs[a, b]
        drawn.append(_both(effects[a, b][keep], guess[a, b][keep], plain[a, b][keep], order[a, b][keep]))
    values = _both(effects[pairs], guess[pairs], plain[pairs], order[pairs])
    rho, r2 = (
        Interval(value, *(float(q) for q in np.nanquantile(column, (0.025, 0.975))))
        for value, column in zip(values, np.array(drawn).T, strict=True)
    )
    return Foretold(by, rho, p, r2, int(pairs.sum()))


def _both(e: np.ndarray, guess: np.ndarray, plain: np.ndarray, order: np.ndarray) -> tuple[float, float]:
    """Spearman and R2; NaN where nothing varies."""
    if not len(e):
        return math.nan, math.nan
    rest = ((e - plain) ** 2).sum()
    return spearman(order, e), float(1 - ((e - guess) ** 2).sum() / rest) if rest else math.nan


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; NaN where one does not vary."""
    from scipy.stats import rankdata  # here: importing scipy.stats costs half a second

    if len(x) < 3 or not (np.ptp(x) and np.ptp(y)):
        return math.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def mantel(measure: np.ndarray, effects: np.ndarray, *, permutations: int, seed: int) -> float:
    """(1 + relabellings of the traits that correlate as well) / (B + 1), for Spearman's over pairs off the diagonal."""
    from scipy.stats import rankdata  # here: importing scipy.stats costs half a second

    n = len(effects)
    free = _free(n)
    pairs, generator = free & np.isfinite(effects), np.random.default_rng(seed)
    ranks, e = np.zeros((n, n)), rankdata(effects[pairs])
    ranks[free] = rankdata(measure[free])  # relabelled, they are the ranks of the relabelled measure
    if not (np.ptp(ranks[pairs]) and np.ptp(e)):
        return math.nan
    e = (e - e.mean()) / e.std()

    def correlation(order: np.ndarray) -> float:
        r = ranks[np.ix_(order, order)][pairs]
        return float(((r - r.mean()) * e).mean() / r.std())

    found = correlation(np.arange(n))
    as_well = sum(correlation(generator.permutation(n)) >= found - 1e-12 for _ in range(permutations))
    return (1 + as_well) / (permutations + 1)
