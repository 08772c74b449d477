"""Ranks of many sparse columns at once, shifted so that the zeros rank 0.

A rank sum needs the rank of every example, zeros included, so it looks dense. Take from each midrank the midrank that
the zeros of its column share: the zeros then add nothing, and the rank sums of all latents under all labellings are
one sparse-dense product. The shift costs nothing, because it moves every labelling's sum by the same constant.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class SortedColumns:
    """The non-zero entries of a matrix [m, n_latents], by latent and then by value.

    latent, row, value  [nnz]
    """

    latent: np.ndarray
    row: np.ndarray
    value: np.ndarray
    m: int
    n_latents: int

    @classmethod
    def of(cls, values: sparse.csr_matrix | np.ndarray) -> "SortedColumns":
        """Sort a matrix [m, n_latents] of any real numbers."""
        entries = sparse.coo_matrix(values, dtype=np.float64)
        entries.eliminate_zeros()
        order = np.lexsort((entries.data, entries.col))
        return cls(entries.col[order], entries.row[order], entries.data[order], *values.shape)  # pyright: ignore

    def __getitem__(self, keep: np.ndarray) -> "SortedColumns":
        """The same columns over the examples that ``keep`` [m] bool picks. Rows keep their numbers."""
        here = keep[self.row]
        return SortedColumns(self.latent[here], self.row[here], self.value[here], int(keep.sum()), self.n_latents)

    def sums(self, entries: np.ndarray) -> np.ndarray:
        """Sum over each latent of something that the entries carry: [nnz] -> [n_latents]."""
        return np.bincount(self.latent, entries, minlength=self.n_latents)

    @cached_property
    def zeros(self) -> np.ndarray:
        """Number of zeros in each column: [n_latents] int64."""
        return self.m - np.bincount(self.latent, minlength=self.n_latents)

    @cached_property
    def zero_midrank(self) -> np.ndarray:
        """The midrank, from 1, that a column's zeros share: [n_latents]."""
        return self.sums(self.value < 0) + (self.zeros + 1) / 2

    @cached_property
    def centred(self) -> np.ndarray:
        """Midrank of each entry within its column, minus that of the zeros: [nnz]. Multiples of a half, so exact."""
        new_latent, new_value = _changes(self.latent), _changes(self.latent, self.value)
        tie, starts = np.cumsum(new_value) - 1, np.flatnonzero(new_value)
        ends = np.append(starts[1:], len(self.latent))
        column_start = np.flatnonzero(new_latent)[np.cumsum(new_latent) - 1]
        among_entries = ((starts + ends - 1) / 2)[tie] - column_start + 1
        return among_entries + self.zeros[self.latent] * (self.value > 0) - self.zero_midrank[self.latent]

    @cached_property
    def matrix(self) -> sparse.csr_matrix:
        """The centred midranks as CSR [n_latents, m]: times labels [m, b] it gives their rank sums."""
        return sparse.csr_matrix((self.centred, (self.latent, self.row)), shape=(self.n_latents, self.m))


def _changes(*keys: np.ndarray) -> np.ndarray:
    """Where any of the keys [n] differs from the one before it; the first entry always does."""
    new = np.ones(len(keys[0]), bool)
    new[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return new
