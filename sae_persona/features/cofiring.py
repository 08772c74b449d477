"""Which latents fire together, counted exactly on a sample of the corpus' tokens.

All pairs of 131,072 latents are 8.6e9, and ten million tokens with 64 latents each hold 2e10 of them. So the tokens are
sampled, not the pairs: those with the lowest of numbers drawn from document and position, with all that fires on
them. Any two parts of a corpus merge to the sample of the whole. On its tokens counts are exact; a share of the
firings of a latent that fires f times among them has a standard error of sqrt(share * (1 - share) / f).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import h5py
import torch
from torch import Tensor

from sae_persona.errors import DataError
from sae_persona.features.firings import Firings, chance

_COUNTS = 2**25  # pairs counted at once: blocks of latents by all latents
_AT_ONCE = 2**18  # firings whose tokens are looked at at once


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The latents that fire with each of b latents, nearest first.

    partner   [b, n] int32   -1: no more
    both      [b, n] int32   sampled tokens on which both fire
    jaccard   [b, n] fp32    both / tokens on which either fires: what they are ordered by
    pmi       [b, n] fp32    ln(p(both) / (p(one) p(other))), in nats
    """

    partner: Tensor
    both: Tensor
    jaccard: Tensor
    pmi: Tensor


class CoFiring:
    """What fires on a sample of at most ``n_tokens`` tokens, as CSR, in the order of the numbers drawn.

    drawn     [s] int64       number of each token, ascending
    offsets   [s + 1] int64   token i owns entries offsets[i] to offsets[i + 1]
    idx       [nnz] int32     latents that fire on it, ascending
    """

    def __init__(self, n_latents: int, n_tokens: int, device: str | torch.device = "cpu") -> None:
        self.n_latents, self.n_tokens = n_latents, n_tokens
        self.drawn = torch.zeros(0, dtype=torch.int64, device=device)
        self.offsets = torch.zeros(1, dtype=torch.int64, device=device)
        self.idx = torch.zeros(0, dtype=torch.int32, device=device)

    def update(self, firings: Firings) -> None:
        """Add some tokens: those of them that the sample takes."""
        drawn = chance(firings.rows.place, -1)
        if len(self.drawn) >= self.n_tokens:
            chosen = drawn <= self.drawn[: self.n_tokens].max().to(drawn.device)
        else:
            chosen = torch.ones_like(drawn, dtype=torch.bool)
        number = chosen.cumsum(0) - 1
        entry = chosen[firings.row].nonzero().flatten()
        row, order = number[firings.row[entry]].sort(stable=True)  # the latents ascend already
        counts = torch.bincount(row, minlength=int(chosen.sum()))
        self._add(drawn[chosen], counts, firings.latent[entry][order].int())

    def merge(self, other: "CoFiring") -> None:
        """Add the sample of another part of the corpus."""
        if (other.n_latents, other.n_tokens) != (self.n_latents, self.n_tokens):
            found = f"{other.n_tokens} tokens of {other.n_latents} latents"
            raise DataError(f"a sample of {found} cannot be merged into one of {self.n_tokens} of {self.n_latents}")
        self._add(other.drawn, other.offsets.diff(), other.idx)
        self.settle()

    def _add(self, drawn: Tensor, counts: Tensor, idx: Tensor) -> None:
        device = self.drawn.device
        self.drawn = torch.cat([self.drawn, drawn.to(device)])
        counts = torch.cat([self.offsets.diff(), counts.to(device)])
        self.offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self.idx = torch.cat([self.idx, idx.to(device)])
        if len(self.drawn) > 2 * self.n_tokens:
            self.settle()

    def settle(self) -> None:
        """Drop what is beyond the sample, and sort it."""
        order = self.drawn.argsort(stable=True)[: self.n_tokens]
        counts = self.offsets.diff()[order]
        self.idx = self.idx[_spread(self.offsets[:-1][order], counts)]
        self.drawn, self.offsets = self.drawn[order], torch.nn.functional.pad(counts.cumsum(0), (1, 0))

    @property
    def n(self) -> int:
        """Tokens in the sample."""
        return min(len(self.drawn), self.n_tokens)

    def fires(self) -> Tensor:
        """Sampled tokens on which each latent fires: [n_latents] int64."""
        return torch.bincount(self.idx, minlength=self.n_latents)

    def neighbours(self, n: int, latents: Tensor | None = None) -> Neighbours:
        """The ``n`` latents that fire most with each of ``latents`` [b] (None: of all), by Jaccard index.

        Of equal ones any may come first. Counts are those of `dense.T @ dense`, without its diagonal.
        """
        self.settle()
        latents = torch.arange(self.n_latents, device=self.idx.device) if latents is None else latents
        block, fires = max(1, _COUNTS // max(1, self.n_latents)), self.fires()
        idx, entry = self.idx.sort(stable=True)  # the entries of each latent
        token = torch.searchsorted(self.offsets, entry, right=True) - 1
        found = [self._nearest(n, some, fires, idx, token) for some in latents.split(block)]
        return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _nearest(
        self, n: int, latents: Tensor, fires: Tensor, idx: Tensor, token: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `Neighbours` holds of a block of latents, from all entries sorted by latent."""
        both = self._counts(latents, fires, idx, token)
        row = torch.arange(len(latents), device=latents.device)
        both[row, latents] = 0
        mine = fires[latents, None]
        jaccard = both / (mine + fires - both).clamp(min=1)
        nearest, partner = jaccard.topk(min(n, self.n_latents), dim=1)
        both = both.gather(1, partner)
        pmi = (both.double() * self.n / (mine * fires[partner]).clamp(min=1)).log().float()
        there = both > 0
        return partner.where(there, -1).int(), both, nearest.float(), pmi.where(there, torch.nan)

    def _counts(self, latents: Tensor, fires: Tensor, idx: Tensor, token: Tensor) -> Tensor:
        """Tokens on which each of some latents [b] fires together with each of all: [b, n_latents] int32."""
        both = torch.zeros(len(latents) * self.n_latents, dtype=torch.int32, device=idx.device)
        first = torch.searchsorted(idx, latents.to(idx.dtype))
        row = torch.arange(len(latents), device=idx.device).repeat_interleave(fires[latents])
        entry = _spread(first, fires[latents])
        sizes = self.offsets.diff()
        for rows, entries in _together(row, entry):
            tokens = token[entries]
            partner = self.idx[_spread(self.offsets[tokens], sizes[tokens])].long()
            pairs = rows.repeat_interleave(sizes[tokens]) * self.n_latents + partner
            both.index_add_(0, pairs, torch.ones_like(pairs, dtype=torch.int32))
        return both.view(len(latents), self.n_latents)

    def to_h5(self, group: h5py.Group) -> None:
        """Write into an empty HDF5 group."""
        self.settle()
        group.attrs["n_latents"], group.attrs["n_tokens"] = self.n_latents, self.n_tokens
        for name in ("drawn", "offsets", "idx"):
            group[name] = getattr(self, name).cpu().numpy()

    @classmethod
    def from_h5(cls, group: Any) -> Self:
        """Read what ``to_h5`` wrote. KeyError if a part is missing."""
        found = cls(int(group.attrs["n_latents"]), int(group.attrs["n_tokens"]))
        found.drawn, found.offsets, found.idx = (
            torch.from_numpy(group[name][:]) for name in ("drawn", "offsets", "idx")
        )
        return found


def _spread(starts: Tensor, counts: Tensor) -> Tensor:
    """starts[0], starts[0] + 1, ... counts[0] of them, then those from starts[1] on: int64."""
    before = counts.cumsum(0) - counts
    total = int(counts.sum())
    return torch.arange(total, device=starts.device) + (starts - before).repeat_interleave(counts, output_size=total)


def _together(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(part.split(_AT_ONCE) for part in parts), strict=True)
