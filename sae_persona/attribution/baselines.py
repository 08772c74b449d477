"""What a latent has to beat: dense directions of the residual stream, and latents picked without looking."""

from dataclasses import dataclass

import numpy as np

from sae_persona.attribution.association import Interval, associate
from sae_persona.attribution.labels import Selection
from sae_persona.attribution.midranks import SortedColumns
from sae_persona.attribution.null import permutation_test


@dataclass(frozen=True)
class DenseBaseline:
    """A direction fitted on the train split, read out on both."""

    name: str
    auroc: Interval
    """On the examples it was fitted to, so flattering."""
    held_out_auroc: Interval
    held_out_p: float
    """By permutation within blocks, one-sided."""


@dataclass(frozen=True)
class RandomLatents:
    """Held-out AUROC of latents that fire as often as the best one, each in its own train direction."""

    n: int
    mean: float
    p95: float


def difference_of_means(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean activation with the label minus without: x [m, d_in], y [m] bool -> [d_in] fp64."""
    return x[y].mean(0, dtype=np.float64) - x[~y].mean(0, dtype=np.float64)


def logistic_probe(x: np.ndarray, y: np.ndarray, c: float) -> np.ndarray:
    """Direction of an L2 logistic regression on standardised inputs: x [m, d_in], y [m] bool -> [d_in] fp64.

    ``c`` is scikit-learn's inverse penalty. The direction is in the units of x: its intercept, which no AUROC sees,
    is left out.
    """
    from sklearn.linear_model import LogisticRegression  # here: importing scikit-learn costs a second
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    standard = scaler.fit_transform(x.astype(np.float64))
    probe = LogisticRegression(C=c, max_iter=10_000).fit(standard, y)
    return probe.coef_[0] / scaler.scale_


def dense_baselines(
    x: np.ndarray, train: Selection, held_out: Selection, *, probe_c: float, permutations: int, seed: int
) -> tuple[DenseBaseline, ...]:
    """Fit both directions on train and test them on held-out. x [examples, d_in] fp32, of all examples."""
    x_train, x_held = x[train.rows].astype(np.float64), x[held_out.rows].astype(np.float64)
    directions = {
        "difference of means": difference_of_means(x_train, train.y),
        "logistic probe": logistic_probe(x_train, train.y, probe_c),
    }
    weights = np.stack(list(directions.values()), axis=1)
    scores = SortedColumns.of(x_held @ weights)
    fitted, repeated = associate(SortedColumns.of(x_train @ weights), train.y), associate(scores, held_out.y)
    null = permutation_test(
        scores,
        held_out.y,
        held_out.blocks,
        permutations=permutations,
        seed=seed,
        direction=np.ones(len(directions)),
    )
    return tuple(
        DenseBaseline(name, fitted.auroc.at(i), repeated.auroc.at(i), float(null.p[i]))
        for i, name in enumerate(directions)
    )


def random_latents(rates: np.ndarray, held_out_auroc: np.ndarray, best: int, n: int) -> RandomLatents:
    """The ``n`` latents nearest to the best one in firing rate, itself left out.

    rates           [n_tested]   share of train examples on which each fires, > 0
    held_out_auroc  [n_tested]   1 - AUROC where the latent fell with the label on train
    """
    distance = np.abs(np.log(rates) - np.log(rates[best]))
    distance[best] = np.inf
    matched = held_out_auroc[np.argsort(distance, kind="stable")[: min(n, len(rates) - 1)]]
    if not len(matched):
        return RandomLatents(0, float("nan"), float("nan"))
    return RandomLatents(len(matched), float(matched.mean()), float(np.quantile(matched, 0.95)))
