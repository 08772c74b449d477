"""Covariates as curves: columns of which a bend in a covariate is nearly a sum.

    x, (x - t_1)+, ..., (x - t_K)+       t_j the j / (K + 1) quantile of x

Linear splines, because latents bend as they do: an encoder's threshold is a kink. No value counts as more than a
1 / (K + 1)^2 share of the examples, or all knots would lie on the most frequent one. Numeric covariates are added up,
so what only the product of two tells is not controlled for (Hastie, Tibshirani and Friedman 2009, ch. 5.2).
"""

import numpy as np

KNOTS = 8
"""Bends that a covariate has at most. With 3 or 5, rankings given a strong confound raised more false alarms; with 12
no fewer."""
_PER_COLUMN = 15
"""Examples that there are for each column at least."""


def is_numeric(values: np.ndarray) -> np.ndarray:
    """Which columns of [m, c] take three values or more; two values are told apart by a line: [c] bool."""
    return np.array([len(np.unique(column)) > 2 for column in values.T], bool)


def room_for_knots(values: np.ndarray, n_blocks: int) -> int:
    """Knots that m examples have room for in each numeric column of [m, c]: 0, a straight line, to KNOTS."""
    numeric = int(is_numeric(values).sum())
    others = values.shape[1] - numeric
    return int(np.clip((len(values) - n_blocks - others) // (_PER_COLUMN * max(numeric, 1)) - 1, 0, KNOTS))


def splines(values: np.ndarray, n_knots: int) -> np.ndarray:
    """The columns of [m, c], each numeric one followed by its bends at up to ``n_knots`` knots: [m, c + bends] fp64."""
    columns: list[np.ndarray] = []
    for column, bends in zip(values.T, is_numeric(values), strict=True):
        columns += [column, *(np.maximum(column - knot, 0) for knot in (_knots(column, n_knots) if bends else ()))]
    return np.stack(columns, axis=1).astype(np.float64) if columns else np.empty((len(values), 0))


def _knots(x: np.ndarray, n: int) -> np.ndarray:
    """Up to ``n`` of the values of x [m], neither its smallest nor its largest."""
    found, counts = np.unique(x, return_counts=True)
    below = np.minimum(counts, len(x) / (n + 1) ** 2).cumsum()
    at = np.searchsorted(below, below[-1] * np.arange(1, n + 1) / (n + 1))
    return np.setdiff1d(found[at], found[[0, -1]])
