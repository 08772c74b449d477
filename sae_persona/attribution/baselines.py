"""What a latent has to beat: dense directions of the residual stream, and latents picked without looking."""

import warnings
from dataclasses import dataclass

import numpy as np

from sae_persona.attribution.association import Interval, associate
from sae_persona.attribution.labels import Selection
from sae_persona.attribution.midranks import SortedColumns
from sae_persona.attribution.null import permutation_test

PROBE_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse L2 penalties that cross-validation chooses from."""
FOLDS = 5
COMPONENTS = 10
"""Principal components that the PCA direction is chosen from."""
RANDOM_DIRECTIONS = 100


@dataclass(frozen=True)
class DenseBaseline:
    """A direction fitted on the train split, read out on both."""

    name: str
    auroc: Interval
    """On the examples it was fitted to, so flattering."""
    held_out_auroc: Interval
    held_out_p: float
    """By permutation within blocks, one-sided."""
    note: str = ""
    """What was chosen on train: the probe's penalty, the principal component."""


@dataclass(frozen=True)
class RandomLatents:
    """Held-out AUROC of latents that fire as often as the best one, each in its own train direction."""

    n: int
    mean: float
    p95: float


@dataclass(frozen=True)
class RandomDirections:
    """Held-out AUROC of random unit directions of the residual stream, each in its own train direction."""

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


def probe_penalty(x: np.ndarray, y: np.ndarray, groups: np.ndarray, *, seed: int) -> float:
    """The C of ``PROBE_GRID`` with the least log loss on groups that were left out: [m, d_in], [m] bool, [m] int.

    Up to FOLDS folds, whole groups (templates) in each, so that a probe which learns the template by heart is not
    rewarded; folds over examples where there is one group only. Of equal ones the strongest penalty.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    losses = np.zeros(len(PROBE_GRID))
    for fit, test in _folds(y, groups, seed):
        scaler = StandardScaler().fit(x[fit])
        # fp32 and a loose tolerance: only the order of the penalties matters here, and it settles early
        inside, outside = (np.asarray(scaler.transform(x[part]), np.float32) for part in (fit, test))
        for i, c in enumerate(PROBE_GRID):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                probe = LogisticRegression(C=c, max_iter=200, tol=1e-3).fit(inside, y[fit])
            chance = np.asarray(probe.predict_proba(outside)[:, 1], np.float64)
            losses[i] += log_loss(y[test], chance, labels=[False, True]) * len(test)
    return PROBE_GRID[int(losses.argmin())]


def _folds(y: np.ndarray, groups: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of example numbers to fit and to test on; both classes are in each part that is fitted."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    rarest = int(min(y.sum(), (~y).sum()))
    found = []
    if (n := min(FOLDS, len(np.unique(groups)), rarest)) > 1:
        split = StratifiedGroupKFold(n, shuffle=True, random_state=seed).split(y[:, None], y, groups)
        found = [(fit, test) for fit, test in split if len(test) and len(np.unique(y[fit])) == 2]
    if not found:
        found = list(StratifiedKFold(min(FOLDS, rarest), shuffle=True, random_state=seed).split(y[:, None], y))
    return found


def pca_direction(x: np.ndarray, y: np.ndarray, *, seed: int) -> tuple[np.ndarray, int]:
    """The principal component of x [m, d_in] that tells y [m] bool best, pointing to it: [d_in] fp64, and its number.

    Labels choose one of the first COMPONENTS, from 1, and its sign; the components themselves see none.
    """
    from sklearn.utils.extmath import randomized_svd

    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    n = min(COMPONENTS, *centred.shape)
    components = randomized_svd(centred, n_components=n, random_state=seed)[2]
    away = associate(SortedColumns.of(centred @ components.T), y).auroc.value - 0.5
    best = int(np.abs(away).argmax())
    return components[best] * (1 if away[best] >= 0 else -1), best + 1


def dense_baselines(
    x: np.ndarray,
    train: Selection,
    held_out: Selection,
    *,
    probe_c: float | None,
    permutations: int,
    seed: int,
    groups: np.ndarray | None = None,
) -> tuple[DenseBaseline, ...]:
    """Fit each direction on train and test it on held-out. x [examples, d_in] fp32, of all examples.

    probe_c  the probe's inverse penalty; None: by cross-validation on train, see ``probe_penalty``
    groups   [m] of the train examples, what cross-validation leaves out whole: templates; None: the blocks
    """
    x_train, x_held = x[train.rows].astype(np.float64), x[held_out.rows].astype(np.float64)
    c = (
        probe_penalty(x_train, train.y, train.blocks if groups is None else groups, seed=seed)
        if probe_c is None
        else probe_c
    )
    component, number = pca_direction(x_train, train.y, seed=seed)
    directions = {
        "difference of means": (difference_of_means(x_train, train.y), ""),
        "logistic probe": (
            logistic_probe(x_train, train.y, c),
            f"C {c:g}, {'cross-validated' if probe_c is None else 'given'}",
        ),
        "PCA direction": (component, f"principal component {number}"),
    }
    weights = np.stack([direction for direction, _ in directions.values()], axis=1)
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
        DenseBaseline(name, fitted.auroc.at(i), repeated.auroc.at(i), float(null.p[i]), note)
        for i, (name, (_, note)) in enumerate(directions.items())
    )


def random_directions(
    x: np.ndarray, train: Selection, held_out: Selection, *, n: int = RANDOM_DIRECTIONS, seed: int
) -> RandomDirections:
    """``n`` directions drawn evenly from the unit sphere, their signs chosen on train. x [examples, d_in] fp32."""
    drawn = np.random.default_rng(seed).normal(size=(x.shape[1], n))
    drawn /= np.linalg.norm(drawn, axis=0)
    fitted, repeated = (
        associate(SortedColumns.of(x[part.rows].astype(np.float64) @ drawn), part.y).auroc.value
        for part in (train, held_out)
    )
    oriented = np.where(fitted >= 0.5, repeated, 1 - repeated)
    return RandomDirections(n, float(oriented.mean()), float(np.quantile(oriented, 0.95)))


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
