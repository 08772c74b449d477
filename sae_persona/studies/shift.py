"""How far each of many measures moved between two models on the same prompts, and what chance would make of it.

    mean_i = mean_p d_pi            d_pi: measure i on prompt p, tuned minus base
    z_i    = sum_p d_pi / sqrt(sum_p d_pi^2)

If a fine-tune had done nothing to a measure, d and -d would be as likely: the null flips the sign of whole prompts, so
it keeps how measures depend on each other, and its largest |z| over measures (Westfall and Young 1993) bounds the
family-wise error. Under flips the denominator stays, so z orders as Student's t does. Intervals are percentiles over
prompts drawn with replacement.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_persona.attribution.association import Interval
from sae_persona.errors import DataError

_ENTRIES = 2**23
"""Sums that are held at once."""
_TIE = 1e-12


@dataclass(frozen=True, eq=False)
class Shift:
    """Arrays [m] over measures.

    mean     with its 95 % interval over prompts
    z        positive where the measure rose; 0 where it moved on no prompt
    p        (1 + #{b: |z_b| >= |z|}) / (B + 1), of this measure alone
    p_max_t  the same against the largest |z| of all measures
    """

    mean: Interval
    z: np.ndarray
    p: np.ndarray
    p_max_t: np.ndarray


def paired_shift(d: Tensor, *, permutations: int, resamples: int, seed: int) -> Shift:
    """Test and bound the mean of d [prompts, m] over prompts. DataError for fewer than two prompts, or NaN."""
    if len(d) < 2 or not bool(d.isfinite().all()):
        raise DataError(f"a shift needs two prompts or more and finite numbers, got {len(d)} prompts")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (permutations, len(d)), generator=generator).double() * 2 - 1
    weights = torch.from_numpy(resampled(len(d), resamples, seed))
    largest, found = torch.zeros(permutations, dtype=torch.float64), []
    for part in d.split(max(1, _ENTRIES // max(permutations, resamples)), dim=1):
        part = part.double()
        scale = part.square().sum(0).sqrt()
        scale = torch.where(scale > 0, scale, torch.inf)
        z = part.sum(0) / scale
        flipped = (signs @ part / scale).abs_()
        largest = torch.maximum(largest, flipped.amax(1))
        low, high = np.quantile((weights @ part).numpy(), (0.025, 0.975), axis=0)
        found.append((part.mean(0).numpy(), low, high, z.numpy(), (flipped >= z.abs() - _TIE).sum(0).numpy()))
    mean, low, high, z, own = (np.concatenate(parts) for parts in zip(*found, strict=True))
    above = permutations - np.searchsorted(np.sort(largest.numpy()), np.abs(z) - _TIE)
    p, p_max_t = ((1 + count) / (permutations + 1) for count in (own, above))
    return Shift(Interval(mean, low, high), z, p, p_max_t)


def resampled(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of n is drawn in each resample, as shares: [resamples, n] fp64."""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return drawn / n


def mean_interval(values: np.ndarray, *, resamples: int, seed: int) -> Interval:
    """Mean over prompts of one measure, [prompts], with its 95 % interval over prompts drawn with replacement."""
    means = resampled(len(values), resamples, seed) @ values
    return Interval(float(values.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975))))
