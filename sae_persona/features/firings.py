"""Which latents fire on which tokens of which texts: what every accumulator of this stage is fed.

texts       document 7: <s> a b c d e f       too long for one context: in two sequences
sequences   <s> a b c | <s> d e f
rows            1 2 3       4 5 6             what is counted: BOS never
position        1 2 3       4 5 6             in the text
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from sae_persona.errors import DataError
from sae_persona.types import SparseLatents

POSITION_BITS = 24
"""A place is document << POSITION_BITS | position: one number that sorts as the corpus does."""
_GOLDEN, _FIRST, _SECOND = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Piece(NamedTuple):
    """One sequence that the model read.

    document   number of its text in the corpus
    first      position in the text of its token 0
    ids        its tokens, [t]
    kept       which of them are counted, bool [t]
    """

    document: int
    first: int
    ids: Sequence[int]
    kept: Tensor


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Where n rows of activations stand in the s sequences that the model read, in the order of the texts.

    ids        [m] int32     tokens of the sequences, whole, one after the other
    at         [n] int64     which of ids each row is; ascending
    sequence   [n] int64     in which sequence
    starts     [s + 1] int64   where each sequence starts in ids, and m
    document   [s] int64     number of its text
    first      [s] int64     position in the text of its token 0
    """

    ids: Tensor
    at: Tensor
    sequence: Tensor
    starts: Tensor
    document: Tensor
    first: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Piece]) -> Self:
        """DataError for a text of more than 2**POSITION_BITS tokens."""
        lengths = np.array([len(one.ids) for one in sequences], np.int64)
        starts = torch.from_numpy(np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]))
        longest = max((one.first + len(one.ids) for one in sequences), default=0)
        if longest > 1 << POSITION_BITS:
            raise DataError(f"a text has {longest} tokens, at most {1 << POSITION_BITS} are taken: split it")
        ids = [np.asarray(one.ids, np.int32) for one in sequences]
        at = torch.cat([torch.zeros(0, dtype=torch.bool), *(one.kept.cpu() for one in sequences)]).nonzero().flatten()
        return cls(
            ids=torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *ids])),
            at=at,
            sequence=torch.searchsorted(starts, at, right=True) - 1,
            starts=starts,
            document=torch.tensor([one.document for one in sequences], dtype=torch.int64),
            first=torch.tensor([one.first for one in sequences], dtype=torch.int64),
        )

    @property
    def n(self) -> int:
        return len(self.at)

    @property
    def place(self) -> Tensor:
        """Document and position of each row as one number: [n] int64."""
        position = self.first[self.sequence] + self.at - self.starts[self.sequence]
        return self.document[self.sequence] << POSITION_BITS | position

    def to(self, device: torch.device | str) -> Self:
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))

    def parts(self, most: int) -> Iterator[tuple[slice, Self]]:
        """Whole sequences at a time, of at most ``most`` rows where they are no longer; with the rows that they are."""
        ends = torch.searchsorted(self.at, self.starts).tolist()  # rows before each sequence, and n
        first = 0
        for s in range(1, len(ends)):
            if s == len(ends) - 1 or ends[s + 1] - ends[first] > most:
                yield slice(ends[first], ends[s]), self._sequences(first, s, ends)
                first = s

    def _sequences(self, first: int, stop: int, ends: list[int]) -> Self:
        low, high = int(self.starts[first]), int(self.starts[stop])
        rows = slice(ends[first], ends[stop])
        return type(self)(
            ids=self.ids[low:high],
            at=self.at[rows] - low,
            sequence=self.sequence[rows] - first,
            starts=self.starts[first : stop + 1] - low,
            document=self.document[first:stop],
            first=self.first[first:stop],
        )


@dataclass(frozen=True, eq=False)
class Firings:
    """The entries of n rows that are above 0, sorted by latent, then by row.

    latent, row   [m] int64
    acts          [m] fp32
    place         [m] int64   document and position of the row
    """

    rows: TokenRows
    n_latents: int
    latent: Tensor
    row: Tensor
    acts: Tensor
    place: Tensor

    @classmethod
    def of(cls, rows: TokenRows, latents: SparseLatents, n_latents: int) -> Self:
        """On the device of the latents. DataError if they are of another number of tokens."""
        if latents.n != rows.n:
            raise DataError(f"{rows.n} tokens need latents of as many, got {latents.n}")
        rows = rows.to(latents.acts.device)
        acts, idx = latents.acts.detach().flatten(), latents.idx.flatten()
        fires = (acts > 0).nonzero().flatten()
        acts, idx, row = acts[fires].float(), idx[fires].int(), latents.token[fires]
        idx, order = idx.sort(stable=True)  # the rows ascend already
        row = row[order]
        return cls(rows, n_latents, idx.long(), row, acts[order], rows.place[row])


def mixed(x: Tensor) -> Tensor:
    """Bits that look like chance, the same on every device: splitmix64's finaliser (Steele et al., 2014) on int64."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def chance(place: Tensor, latent: Tensor | int) -> Tensor:
    """A number from 0 to 2**63 that belongs to a place and a latent, or to the place alone (-1): int64."""
    number = torch.as_tensor(latent, dtype=torch.int64, device=place.device) + 2
    return mixed(mixed(place * _GOLDEN) + number * _GOLDEN) & (2**63 - 1)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted to the right with zeros, as if x were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def lexsort(*keys: Tensor) -> Tensor:
    """The order by the first key, of equal ones by the second, and so on: [m] int64."""
    order = keys[-1].argsort(stable=True)
    for key in reversed(keys[:-1]):
        order = order[key[order].argsort(stable=True)]
    return order


def changes(*keys: Tensor) -> Tensor:
    """Where any of the keys [m] differs from the one before it; the first entry always does: bool [m]."""
    new = torch.ones_like(keys[0], dtype=torch.bool)
    for i, key in enumerate(keys):
        differs = key[1:] != key[:-1]
        new[1:] = differs if i == 0 else new[1:] | differs
    return new
