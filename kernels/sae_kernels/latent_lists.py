"""Latent lists: who fired each latent.

    idx      [n, k] or [nnz]   int64     the latent of each entry
    offsets  None or [n + 1]   int64     token i owns entries offsets[i] to offsets[i + 1]; None: k entries a token
    entry    [nnz]             int64     positions in idx.flatten(), ordered by latent, then by token
    token    [nnz]             int64     the token of each of them
    offsets  [n_latents + 1]   int64     latent l owns entry[offsets[l] : offsets[l + 1]]

One stable sort; the sums over these lists then need no atomics and come out the same every time.
Oracle: `reference.latent_lists`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentLists:
    """The entries of a batch grouped by latent; shapes above."""

    entry: Tensor
    token: Tensor
    offsets: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """Sum of the values (laid out as idx) that belong to each latent: [n_latents]."""
        return torch.segment_reduce(
            values.flatten().index_select(0, self.entry), "sum", offsets=self.offsets, initial=0
        )


def latent_lists(idx: Tensor, n_latents: int, offsets: Tensor | None = None) -> LatentLists:
    entry, bounds = _sorted(idx.flatten(), n_latents)
    if offsets is None:
        token = entry // idx.shape[1]
    else:
        # how many tokens end at or before the entry
        token = torch.searchsorted(offsets[1:], entry, right=True)
    return LatentLists(entry, token, bounds)


def _sorted(latent: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """The stable order of the entries by latent, and where each latent begins in it."""
    if latent.is_cuda or n_latents > 2**16:
        values, entry = latent.sort(stable=True)
        return entry, torch.searchsorted(values, torch.arange(n_latents + 1, device=latent.device))
    # numpy's radix sort of 16-bit keys: twice torch's, whose threads wait for each other at every digit
    entry = torch.from_numpy(latent.to(torch.uint16).numpy().argsort(kind="stable"))
    counts = torch.bincount(latent, minlength=n_latents)
    return entry, torch.nn.functional.pad(counts.cumsum(0), (1, 0))
