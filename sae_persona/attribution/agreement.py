"""How well estimates of effects agree with effects that were measured."""

from typing import Any

import numpy as np

from sae_persona.attribution.association import Interval
from sae_persona.attribution.screens import Agreement


def agreement(
    name: Any, split: Any, estimate: np.ndarray, exact: np.ndarray, resamples: int, generator: np.random.Generator
) -> Agreement:
    """Spearman's correlation of ``estimate`` and ``exact`` [n], its bootstrap interval over latents, and the signs."""
    n, moved = len(exact), exact != 0
    drawn = generator.integers(n, size=(resamples, n))
    spearman = _spearman(estimate[drawn], exact[drawn])
    spearman = spearman[np.isfinite(spearman)]
    low, high = np.quantile(spearman, (0.025, 0.975)) if len(spearman) else (float("nan"), float("nan"))
    same = np.sign(estimate[moved]) == np.sign(exact[moved])
    return Agreement(
        estimate=name,
        split=split,
        n=n,
        spearman=Interval(float(_spearman(estimate[None], exact[None])[0]), float(low), float(high)),
        same_sign=float(same.mean()) if len(same) else float("nan"),
    )


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of x with that of y [b, n]: [b]. NaN where one does not vary."""
    from scipy.stats import rankdata  # here: importing scipy.stats costs half a second

    x, y = (rankdata(part, axis=1) for part in (x, y))
    x, y = (part - part.mean(axis=1, keepdims=True) for part in (x, y))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
