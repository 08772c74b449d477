"""Where each latent fires: the tokens around, from its strongest texts and from a sample of all its firings.

Both tables keep the first few of each latent's firings in an order that depends on nothing but the firing itself: by
strength, or by a number drawn from document, position and latent. So however the corpus is cut and in whatever order
its parts are merged, the tables are the same to the bit.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import h5py
import torch
from torch import Tensor

from sae_persona.errors import DataError
from sae_persona.features.firings import POSITION_BITS, Firings, chance, changes, lexsort

WINDOW = 12
"""Tokens shown on each side of the one that fires."""
_WIDTH = 2 * WINDOW + 1
_LAST = 2**63 - 1  # a priority behind all others
_AT_ONCE = 2**18  # windows cut at once: 25 numbers each


@dataclass(frozen=True)
class Context:
    """A piece of a document around a token on which a latent fires."""

    document: int
    position: int
    """Index in the document of the token that it is about."""
    tokens: list[int]
    acts: list[float]
    """The latent's activation on each of ``tokens``."""
    at: int | None = None
    """Index in ``tokens`` of the token that it is about. None: the strongest of them."""
    quantile: float | None = None
    """Share of the latent's firings that are at most as strong, for a context of a sample."""

    @property
    def strength(self) -> float:
        return max(self.acts) if self.at is None else self.acts[self.at]


@dataclass(frozen=True, eq=False)
class _Entries:
    """Firings in no order: latent, place [m]; tokens, acts [m, 2 * WINDOW + 1], the firing in the middle."""

    latent: Tensor
    place: Tensor
    tokens: Tensor
    acts: Tensor

    @property
    def strength(self) -> Tensor:
        return self.acts[:, WINDOW]

    def __getitem__(self, rows: Tensor) -> "_Entries":
        return _Entries(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __add__(self, other: "_Entries") -> "_Entries":
        return _Entries(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


class Contexts(ABC):
    """The first ``per_latent`` firings of each latent in some order, each with the tokens around it.

    document  [n_latents, per_latent]                  int64   -1: no context
    position  [n_latents, per_latent]                  int32
    tokens    [n_latents, per_latent, 2 * WINDOW + 1]  int32   -1: beyond the ends of what the model read at once
    acts      as tokens                                fp32    the firing in the middle
    """

    one_a_document: ClassVar[bool]
    PARTS: ClassVar = ("document", "position", "tokens", "acts")

    def __init__(self, n_latents: int, per_latent: int = 8, device: str | torch.device = "cpu") -> None:
        shape = (n_latents, per_latent)
        self.document = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.position = torch.zeros(shape, dtype=torch.int32, device=device)
        self.tokens = torch.full((*shape, _WIDTH), -1, dtype=torch.int32, device=device)
        self.acts = torch.zeros((*shape, _WIDTH), dtype=torch.float32, device=device)

    @abstractmethod
    def priority(self, latent: Tensor, place: Tensor, strength: Tensor) -> Tensor:
        """What firings [m] are ordered by, the lowest first: [m] int64, at least 0."""

    @property
    def per_latent(self) -> int:
        return self.document.shape[1]

    def update(self, firings: Firings) -> None:
        """Add the firings on some tokens. DataError if they are of another number of latents."""
        if firings.n_latents != len(self.document):
            raise DataError(f"contexts of {len(self.document)} latents take no firings of {firings.n_latents}")
        f, device = firings, self.document.device
        # one as late as the last that is kept may still be before it by its place, so equal ones stay in
        late = self._last().to(f.latent.device)
        entry = (self.priority(f.latent, f.place, f.acts) <= late[f.latent]).nonzero().flatten()
        entry = entry[self._first(f.latent[entry], f.place[entry], f.acts[entry])]
        for part in entry.split(_AT_ONCE):
            tokens, acts = windows(f, part)
            new = (f.latent[part], f.place[part], tokens, acts)
            self._keep(_Entries(*(x.to(device) for x in new)))

    def merge(self, other: Self) -> None:
        """Add the contexts that another process kept. Order does not matter."""
        if other.document.shape != self.document.shape:
            shapes = list(other.document.shape), list(self.document.shape)
            raise DataError(f"contexts of shape {shapes[0]} cannot be merged into {shapes[1]}")
        device = self.document.device
        for latents in torch.arange(len(self.document)).split(max(1, 4 * _AT_ONCE // max(1, self.per_latent))):
            kept = other._of(latents.to(other.document.device))
            self._keep(_Entries(*(getattr(kept, field.name).to(device) for field in fields(kept))))

    def of(self, latent: int) -> list[Context]:
        """The contexts of one latent in their order: of top contexts, the strongest first."""
        kept = self._of(torch.tensor([latent], device=self.document.device))
        found = []
        for place, tokens, acts in zip(kept.place.tolist(), kept.tokens.cpu(), kept.acts.cpu(), strict=True):
            shown = tokens >= 0
            document, position = place >> POSITION_BITS, place & ((1 << POSITION_BITS) - 1)
            at = int(shown[:WINDOW].sum())
            found.append(Context(document, position, tokens[shown].tolist(), acts[shown].tolist(), at))
        return found

    def _last(self) -> Tensor:
        """The priority of the last that is kept of each latent; behind all others while there is room: [n_latents]."""
        full = self.document[:, -1] >= 0
        latent = torch.arange(len(full), device=full.device)
        place = self.document[:, -1] << POSITION_BITS | self.position[:, -1]
        return self.priority(latent, place, self.acts[:, -1, WINDOW]).where(full, _LAST)

    def _first(self, latent: Tensor, place: Tensor, strength: Tensor) -> Tensor:
        """Which of some firings [m] come first of their latent, in order: indices."""
        priority = self.priority(latent, place, strength)
        order = lexsort(latent, priority, place)
        if self.one_a_document:
            # what comes first of a document: a stable sort keeps the order within each
            document = place[order] >> POSITION_BITS
            grouped = lexsort(latent[order], document)
            best = grouped[changes(latent[order][grouped], document[grouped])]
            order = order[best.sort().values]
        mine = latent[order]
        slot = torch.arange(len(mine), device=mine.device) - torch.searchsorted(mine, mine)
        return order[slot < self.per_latent]

    def _of(self, latents: Tensor) -> _Entries:
        row, slot = (self.document[latents] >= 0).nonzero(as_tuple=True)
        at = latents[row], slot
        return _Entries(at[0], self.document[at] << POSITION_BITS | self.position[at], self.tokens[at], self.acts[at])

    def _keep(self, new: _Entries) -> None:
        if not len(new.latent):
            return
        pool = new + self._of(new.latent.unique())
        pool = pool[self._first(pool.latent, pool.place, pool.strength)]
        slot = torch.arange(len(pool.latent), device=pool.latent.device) - torch.searchsorted(pool.latent, pool.latent)
        at = pool.latent, slot
        self.document[at] = pool.place >> POSITION_BITS
        self.position[at] = (pool.place & ((1 << POSITION_BITS) - 1)).int()
        self.tokens[at], self.acts[at] = pool.tokens, pool.acts

    def to_h5(self, group: h5py.Group) -> None:
        """Write into an empty HDF5 group."""
        for name in self.PARTS:
            group.create_dataset(name, data=getattr(self, name).cpu().numpy(), compression="gzip", compression_opts=1)

    @classmethod
    def from_h5(cls, group: Any) -> Self:
        """Read what ``to_h5`` wrote. KeyError if a part is missing."""
        contexts = cls(0)
        for name in cls.PARTS:
            setattr(contexts, name, torch.from_numpy(group[name][:]))
        return contexts


class TopContexts(Contexts):
    """The strongest contexts of each latent, at most one from a document; of equal ones the first of the corpus."""

    one_a_document = True

    def priority(self, latent: Tensor, place: Tensor, strength: Tensor) -> Tensor:
        # the bits of a positive fp32 grow as it does
        return (2**31 - 1) - strength.contiguous().view(torch.int32).long()


class SampledContexts(Contexts):
    """A sample of each latent's firings, each as likely as any other: those with the lowest of numbers drawn for them.

    What it holds from a band of strengths is a sample of that band: the first of it by those numbers. So picking as
    many from each quantile is sampling by quantile, as far as the sample reaches.
    """

    one_a_document = False

    def priority(self, latent: Tensor, place: Tensor, strength: Tensor) -> Tensor:
        return chance(place, latent)


def windows(firings: Firings, entry: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens around some entries [c], and the latent's activations on them: [c, 2 * WINDOW + 1] int32 and fp32.

    A window ends where the sequence does that the model read at once. Entries of a latent are sorted by row, and rows
    are tokens in their order, so what fires within WINDOW tokens stands within WINDOW entries.
    """
    f, rows = firings, firings.rows
    span = torch.arange(-WINDOW, WINDOW + 1, device=entry.device)
    row = f.row[entry]
    center, sequence = rows.at[row, None], rows.sequence[row]
    around = center + span
    inside = (around >= rows.starts[sequence, None]) & (around < rows.starts[sequence + 1, None])
    tokens = rows.ids[around.clamp(0, max(0, len(rows.ids) - 1))].where(inside, -1)
    near = entry[:, None] + span
    there = (near >= 0) & (near < len(f.latent))
    near = near.clamp(0, max(0, len(f.latent) - 1))
    distance = rows.at[f.row[near]] - center
    there &= (f.latent[near] == f.latent[entry, None]) & (distance.abs() <= WINDOW)
    column = (distance + WINDOW).where(there, _WIDTH)  # one more column takes what is not there
    acts = f.acts.new_zeros(len(entry), _WIDTH + 1).scatter_(1, column, f.acts[near])[:, :_WIDTH]
    return tokens, acts.where(inside, 0)
