"""How often and how strongly each latent fires: one pass, a fixed amount of memory, halves that add up to the whole."""

from typing import Any, Self

import h5py
import numpy as np
import torch
from torch import Tensor

from sae_persona.errors import ConfigError, DataError
from sae_persona.types import SparseLatents

# a bin is the exponent and the first 4 bits of the mantissa of an fp32: 16 an octave, exact on every device,
# no logarithm whose last bit could put the same activation into two bins
_DROPPED_BITS = 19
_FIRST = (127 - 12) << 4  # 2**-12
N_BINS = 28 * 16  # to 2**16
EDGES = torch.from_numpy(((np.arange(N_BINS + 1, dtype=np.int32) + _FIRST) << _DROPPED_BITS).view(np.float32))
_SUMS = ("fired", "total", "squares", "maximum", "histogram")


class LatentStats:
    """Counts, moments, maximum and a histogram of each latent's activations.

    n_tokens             tokens seen
    fired      [n_latents]          int64   tokens with a non-zero activation
    total      [n_latents]          fp64    sum of the activations
    squares    [n_latents]          fp64    sum of their squares
    maximum    [n_latents]          fp32    0 where the latent never fired
    histogram  [n_latents, N_BINS]  int64   of the non-zero activations; what lies outside EDGES is in the end bins
    """

    def __init__(self, n_latents: int, device: str | torch.device = "cpu") -> None:
        self.n_tokens = 0
        self.fired = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.total = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self.squares = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self.maximum = torch.zeros(n_latents, dtype=torch.float32, device=device)
        self.histogram = torch.zeros(n_latents, N_BINS, dtype=torch.int64, device=device)

    @property
    def n_latents(self) -> int:
        return len(self.fired)

    def update(self, latents: SparseLatents) -> None:
        """Add the latents of n more tokens. Entries of zero do not count as firing."""
        acts, idx = latents.acts.detach().flatten().to(self.total.device), latents.idx.flatten().to(self.total.device)
        fires = (acts > 0).nonzero().flatten()
        self.add(acts[fires].float(), idx[fires].long(), latents.n)

    def add(self, acts: Tensor, idx: Tensor, n: int) -> None:
        """Add n more tokens by what fires on them: acts [m] fp32 > 0, idx [m] int64."""
        self.n_tokens += n
        self.fired.index_add_(0, idx, torch.ones_like(idx))
        self.total.index_add_(0, idx, acts.double())
        self.squares.index_add_(0, idx, acts.double().square())
        self.maximum.scatter_reduce_(0, idx, acts, "amax")
        self.histogram.view(-1).index_add_(0, idx * N_BINS + _bins(acts), torch.ones_like(idx))

    def merge(self, other: "LatentStats") -> None:
        """Add the tokens that another process has seen: counts exactly, sums in fp64."""
        if other.n_latents != self.n_latents:
            raise DataError(f"statistics of {other.n_latents} latents cannot be merged into those of {self.n_latents}")
        self.n_tokens += other.n_tokens
        self.fired += other.fired
        self.total += other.total
        self.squares += other.squares
        self.histogram += other.histogram
        self.maximum = torch.maximum(self.maximum, other.maximum)

    @property
    def firing_rate(self) -> Tensor:
        """Share of tokens on which each latent is non-zero: [n_latents] fp64."""
        return self.fired.double() / max(self.n_tokens, 1)

    @property
    def mean(self) -> Tensor:
        """Mean activation over all tokens, zeros included: [n_latents] fp64."""
        return self.total / max(self.n_tokens, 1)

    @property
    def variance(self) -> Tensor:
        """Variance of the activation over all tokens, zeros included: [n_latents] fp64."""
        return (self.squares / max(self.n_tokens, 1) - self.mean.square()).clamp(min=0)

    def quantile(self, q: float) -> Tensor:
        """Quantile of each latent's non-zero activations: [n_latents] fp32, NaN where it never fired.

        Interpolated inside its bin, so it is off by less than 1/16 of itself, and never above the maximum.
        ConfigError unless 0 <= q <= 1.
        """
        if not 0 <= q <= 1:
            raise ConfigError(f"a quantile lies between 0 and 1, got {q}")
        cumulative = self.histogram.cumsum(1)
        target = (q * self.fired.double()).clamp(
            min=1e-9
        )  # above 0, so that q = 0 finds the first bin that holds anything
        where = (cumulative < target[:, None]).sum(1, keepdim=True).clamp(max=N_BINS - 1)
        held = self.histogram.gather(1, where).squeeze(1)
        share = (target - (cumulative.gather(1, where).squeeze(1) - held)) / held
        edges = EDGES.to(share.device)
        low, high = edges[where.squeeze(1)], edges[where.squeeze(1) + 1]
        return torch.minimum(low + share.float() * (high - low), self.maximum).where(self.fired > 0, torch.nan)

    def share_below(self, latent: Tensor, acts: Tensor) -> Tensor:
        """The quantile of activations [m] > 0 among all those of their latents [m]: fp64, from 0 to 1.

        The share that is smaller, counting half of those in the same bin.
        """
        histogram = self.histogram[latent]
        bin = _bins(acts.float().to(self.total.device))[:, None]
        upto, held = histogram.cumsum(1).gather(1, bin), histogram.gather(1, bin)
        return ((upto - held / 2).squeeze(1) / self.fired[latent].clamp(min=1)).double()

    @property
    def p999(self) -> Tensor:
        """99.9th percentile of the non-zero activations, the unit of strength that outlives an outlier: [n_latents]."""
        return self.quantile(0.999)

    def to_h5(self, group: h5py.Group) -> None:
        """Write into an empty HDF5 group."""
        group.attrs["n_tokens"] = self.n_tokens
        for name in _SUMS:
            group.create_dataset(name, data=getattr(self, name).cpu().numpy(), compression="gzip", compression_opts=1)

    @classmethod
    def from_h5(cls, group: Any) -> Self:
        """Read what ``to_h5`` wrote. KeyError if a part is missing."""
        stats = cls(0)
        stats.n_tokens = int(group.attrs["n_tokens"])
        for name in _SUMS:
            setattr(stats, name, torch.from_numpy(group[name][:]))
        return stats


def _bins(acts: Tensor) -> Tensor:
    """The bin of each activation [m] fp32: int64."""
    return ((acts.contiguous().view(torch.int32) >> _DROPPED_BITS) - _FIRST).clamp(0, N_BINS - 1).long()
