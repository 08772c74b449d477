"""Random latents to hold an edit against."""

from collections.abc import Iterable

import numpy as np


def matched_latents(rates: np.ndarray, taken: Iterable[int], latent: int, n: int, *, seed: int) -> list[int]:
    """``n`` random latents out of the 4 n that are nearest to ``latent`` in firing rate, without those ``taken``.

    rates   [n_latents] where the clamp will act: latents that fire elsewhere only would be easy controls
    """
    free = np.flatnonzero((rates > 0) & ~np.isin(np.arange(len(rates)), list(taken)))
    distance = np.abs(np.log(rates[free]) - np.log(rates[latent]))
    nearest = free[np.argsort(distance, kind="stable")[: 4 * n]]
    picked = np.random.default_rng(seed).permutation(nearest)[:n]
    return [int(i) for i in picked]
