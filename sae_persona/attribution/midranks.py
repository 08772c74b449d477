"""Ranks of many sparse columns at once, shifted so that the zeros rank 0.

A rank sum needs the rank of every example, zeros included, so it looks dense. Take from each midrank the midrank that
the zeros of its column share: the zeros then add nothing, and the rank sums of all latents under all labellings are
one sparse-dense product. The shift costs nothing, because it moves every labelling's sum by the same constant. Twice
a midrank is a whole number, so these sums are exact.

One sort serves all: entries that are left out, or dealt to groups, leave the others in their order.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from sae_kernels.ops import latent_lists
from scipy import sparse
from torch import Tensor

from sae_persona.errors import DataError


@dataclass(frozen=True)
class SortedColumns:
    """The non-zero entries of a matrix [m, n_latents], by latent and then by value; all on one device.

    latent, row  [nnz] int64
    value        [nnz] fp32 or fp64
    sizes        [n_latents] int64, the number of examples that each column is over: m, but for ``within``
    m            rows: labels that the entries are multiplied with are [m, ...]
    """

    latent: Tensor
    row: Tensor
    value: Tensor
    sizes: Tensor
    m: int

    @classmethod
    def of(cls, values: sparse.csr_matrix | np.ndarray, device: str | torch.device = "cpu") -> "SortedColumns":
        """Sort a matrix [m, n_latents] of any real numbers. DataError for one that is not finite: it has no rank."""
        entries = sparse.coo_matrix(values)
        m, n_latents = entries.shape  # pyright: ignore
        row, latent = (torch.from_numpy(part.astype(np.int64)).to(device) for part in (entries.row, entries.col))
        if not np.isfinite(entries.data).all():
            bad = int(np.flatnonzero(~np.isfinite(entries.data))[0])
            raise DataError(
                f"latent {entries.col[bad]} is {entries.data[bad]} at example {entries.row[bad]}, a finite number is "
                f"wanted: measure in float32, or leave the example out"
            )
        data = entries.data if entries.data.dtype == np.float32 else entries.data.astype(np.float64)
        value = torch.from_numpy(data).to(device)
        order = value.argsort(stable=True)
        order = order[value[order] != 0]
        order = order[latent_lists(latent[order, None], n_latents).entry]
        return cls(latent[order], row[order], value[order], torch.full((n_latents,), m, device=device), m)

    @property
    def n_latents(self) -> int:
        return len(self.sizes)

    def rows(self, chosen: np.ndarray) -> "SortedColumns":
        """The same columns over the rows ``chosen``, distinct; row chosen[i] gets number i."""
        number = torch.full((self.m,), -1)
        number[torch.from_numpy(chosen)] = torch.arange(len(chosen))
        row = number.to(self.row.device)[self.row]
        here = row >= 0
        sizes = torch.full_like(self.sizes, len(chosen))
        return SortedColumns(self.latent[here], row[here], self.value[here], sizes, len(chosen))

    def latents(self, chosen: np.ndarray) -> "SortedColumns":
        """The columns ``chosen``, ascending; column chosen[i] gets number i."""
        number = torch.full((self.n_latents,), -1)
        number[torch.from_numpy(chosen)] = torch.arange(len(chosen))
        latent = number.to(self.row.device)[self.latent]
        here = latent >= 0
        sizes = self.sizes[torch.from_numpy(chosen).to(self.sizes.device)]
        return SortedColumns(latent[here], self.row[here], self.value[here], sizes, self.m)

    def within(self, groups: np.ndarray, n_groups: int) -> "SortedColumns":
        """Each column dealt to the groups of its rows: column latent * n_groups + group. groups [m], from 0."""
        group = torch.from_numpy(groups).to(self.row.device)
        column = self.latent * n_groups + group[self.row]
        order = column.argsort(stable=True)
        sizes = torch.bincount(group, minlength=n_groups).repeat(self.n_latents)
        return SortedColumns(column[order], self.row[order], self.value[order], sizes, self.m)

    def sums(self, entries: Tensor) -> Tensor:
        """Sum over each latent of something that the entries carry: [nnz] -> [n_latents] fp64."""
        return torch.segment_reduce(entries.double(), "sum", offsets=self.offsets, initial=0)

    def products(self, entries: Tensor, columns: Tensor) -> Tensor:
        """Sums of entry [nnz] times what its row has in each of the columns [m, c]: [n_latents, c] fp64.

        Whole numbers give whole numbers, exactly, up to 2^53.
        """
        if not columns.shape[1]:
            return columns.new_zeros(self.n_latents, 0, dtype=torch.float64)
        return torch.nn.functional.embedding_bag(
            self.row, columns.double(), self.offsets, mode="sum", per_sample_weights=entries.double(),
            include_last_offset=True,
        )  # fmt: skip

    @cached_property
    def counts(self) -> Tensor:
        """Entries of each column: [n_latents] int64."""
        return torch.bincount(self.latent, minlength=self.n_latents)

    @cached_property
    def offsets(self) -> Tensor:
        """Latent i owns entries offsets[i] to offsets[i + 1]: [n_latents + 1] int64."""
        return torch.nn.functional.pad(self.counts.cumsum(0), (1, 0))

    @property
    def zeros(self) -> Tensor:
        """Number of zeros in each column: [n_latents] int64."""
        return self.sizes - self.counts

    @cached_property
    def zero_midrank(self) -> Tensor:
        """The midrank, from 1, that a column's zeros share: [n_latents] fp64."""
        return self._doubled_zero_midrank / 2

    @cached_property
    def _doubled_zero_midrank(self) -> Tensor:
        below = torch.bincount(self.latent[self.value < 0], minlength=self.n_latents)
        return 2 * below + self.zeros + 1

    @cached_property
    def doubled(self) -> Tensor:
        """Twice the midrank of each entry within its column, minus that of the zeros: [nnz] int32."""
        starts_tie = torch.ones_like(self.latent, dtype=torch.bool)
        starts_tie[1:] = (self.latent.diff() != 0) | (self.value.diff() != 0)
        starts = starts_tie.nonzero().flatten()
        ends = torch.cat([starts[1:], starts.new_tensor([len(self.latent)])])
        tie = starts_tie.cumsum(0) - 1
        among_entries = (starts + ends + 1)[tie] - 2 * self.offsets[self.latent]
        above = 2 * self.zeros[self.latent] * (self.value > 0)
        return (among_entries + above - self._doubled_zero_midrank[self.latent]).int()

    @property
    def centred(self) -> Tensor:
        """Midrank of each entry minus that of the zeros of its column: [nnz] fp64, multiples of a half."""
        return self.doubled.double() / 2
