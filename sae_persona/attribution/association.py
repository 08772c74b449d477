"""How strongly each latent goes with a label: four measures, each with its 95 % interval, all latents at once."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from sae_persona.attribution.midranks import SortedColumns

_TAIL = 0.975
_NORMAL = ndtri(_TAIL)


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval; of one latent, or arrays [n_latents]."""

    value: Any
    low: Any
    high: Any

    def at(self, latent: int) -> "Interval":
        """The numbers of one latent."""
        return Interval(*(float(part[latent]) for part in self))


@dataclass(frozen=True)
class Association:
    """Measures of each latent f against a label y, arrays [n_latents] in each interval.

    auroc       P(f of a positive > f of a negative), ties half; DeLong's interval (Biometrics 44, 1988) on the
                logit scale; where DeLong's variance is 0, as at 0 and 1, Newcombe's score interval (Statistics in
                Medicine 25, 2006, method 5)
    r           point-biserial (Pearson) correlation; Fisher's z interval. NaN where f or y does not vary
    difference  mean of f with the label minus without, in activation units; Welch's interval
    d           Cohen's d, by the pooled standard deviation; Hedges and Olkin's large-sample interval (1985, ch. 5)
    """

    auroc: Interval
    r: Interval
    difference: Interval
    d: Interval


def associate(columns: SortedColumns, y: np.ndarray) -> Association:
    """Measure every column against ``y`` [m] bool, of which at least two are True and two False."""
    positive, negative = columns.rows(np.flatnonzero(y)), columns.rows(np.flatnonzero(~y))
    n1, n0 = positive.m, negative.m
    mean1, spread1 = _moments(positive, positive.value)
    mean0, spread0 = _moments(negative, negative.value)
    difference = mean1 - mean0
    _, spread = _moments(columns, columns.value)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.clip(difference * np.sqrt(n1 * n0 / (n1 + n0) / spread), -1, 1)
        d = difference / np.sqrt((spread1 + spread0) / (n1 + n0 - 2))
        return Association(
            auroc=_auroc(columns, positive, negative, y),
            r=fisher(r, n1 + n0 - 3),
            difference=_welch(difference, spread1 / (n1 - 1) / n1, spread0 / (n0 - 1) / n0, n1, n0),
            d=_around(d, _NORMAL * np.sqrt((n1 + n0) / (n1 * n0) + d**2 / (2 * (n1 + n0)))),
        )


def aurocs(columns: SortedColumns, labels: Tensor) -> Tensor:
    """AUROC of every column for every label, ties half: labels [m, c] of zeros and ones -> [n_latents, c] fp64.

    One sparse-dense product. NaN where a label has one class.
    """
    n1 = labels.double().sum(0)
    rank_sums = columns.products(columns.doubled, labels) / 2 + n1 * columns.zero_midrank[:, None]
    return (rank_sums - n1 * (n1 + 1) / 2) / (n1 * (columns.m - n1))


def correlations(columns: SortedColumns, labels: Tensor) -> Tensor:
    """Point-biserial correlation of every column with every label: labels [m, c] -> [n_latents, c] fp64.

    One sparse-dense product. NaN where a column or a label does not vary.
    """
    centred = labels.double() - labels.double().mean(0)
    mean = columns.sums(columns.value) / columns.m
    spread = columns.sums((columns.value - mean[columns.latent]) ** 2) + columns.zeros * mean**2
    scale = (spread[:, None] * centred.square().sum(0)).sqrt()
    return (columns.products(columns.value, centred) / scale).clamp(-1, 1)


def fisher(r: np.ndarray, freedom: float) -> Interval:
    """Fisher's interval of a correlation; freedom: examples - 3 - what else is controlled for."""
    with np.errstate(divide="ignore"):
        return _around(np.arctanh(r), _NORMAL / np.sqrt(max(freedom, 1)), through=np.tanh)


def _around(value: np.ndarray, half_width: Any, through: Any = lambda x: x) -> Interval:
    return Interval(through(value), through(value - half_width), through(value + half_width))


def _moments(columns: SortedColumns, entries: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sum of squared deviations of each column whose non-zeros are ``entries`` [nnz]."""
    mean = columns.sums(entries) / columns.m
    spread = columns.sums((entries - mean[columns.latent]) ** 2) + columns.zeros * mean**2
    return mean.cpu().numpy(), spread.cpu().numpy()


def _auroc(columns: SortedColumns, positive: SortedColumns, negative: SortedColumns, y: np.ndarray) -> Interval:
    n1, n0 = positive.m, negative.m
    labels = torch.from_numpy(y).to(columns.row.device)
    auroc = aurocs(columns, labels[:, None])[:, 0].cpu().numpy()
    shows = labels[columns.row]
    # an example's rank among all minus its rank in its own class counts the other class's examples below it;
    # both ranks are shifted by constants, which a variance does not see
    _, spread1 = _moments(positive, (columns.centred[shows] - positive.centred) / n0)
    _, spread0 = _moments(negative, (columns.centred[~shows] - negative.centred) / n1)
    half_width = _NORMAL * np.sqrt(spread1 / (n1 - 1) / n1 + spread0 / (n0 - 1) / n0)
    low, high = _score_interval(auroc, n1, n0)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle, half_width = np.log(auroc / (1 - auroc)), half_width / (auroc * (1 - auroc))
        usable = np.isfinite(half_width) & (half_width > 0)
        logit_low, logit_high = (1 / (1 + np.exp(-(middle + sign * half_width))) for sign in (-1, 1))
    return Interval(auroc, np.where(usable, logit_low, low), np.where(usable, logit_high, high))


def _score_interval(auroc: np.ndarray, n1: int, n0: int) -> tuple[np.ndarray, np.ndarray]:
    """The AUROCs that lie 1.96 standard errors from the one seen, with the errors that they would have themselves."""
    other = (n1 + n0) / 2 - 1

    def outside(theta: np.ndarray) -> np.ndarray:
        factor = 1 + other * (1 - theta) / (2 - theta) + other * theta / (1 + theta)
        return np.abs(auroc - theta) > _NORMAL * np.sqrt(theta * (1 - theta) * factor / (n1 * n0))

    bounds = []
    for edge in (0.0, 1.0):
        far, near = np.full_like(auroc, edge), auroc.copy()
        for _ in range(40):
            middle = (far + near) / 2
            beyond = outside(middle)
            far, near = np.where(beyond, middle, far), np.where(beyond, near, middle)
        bounds.append(near)
    return bounds[0], bounds[1]


def _welch(difference: np.ndarray, square1: np.ndarray, square0: np.ndarray, n1: int, n0: int) -> Interval:
    """Welch's interval; ``square1`` and ``square0`` are the squared standard errors of the two means."""
    freedom = (square1 + square0) ** 2 / (square1**2 / (n1 - 1) + square0**2 / (n0 - 1))
    # 0/0 where neither class varies: the half-width is 0 whatever the degrees of freedom
    quantile = stdtrit(np.nan_to_num(freedom, nan=1.0), _TAIL)
    return _around(difference, quantile * np.sqrt(square1 + square0))
