"""Where each latent fires hardest: the tokens around, from different documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import h5py
import numpy as np
from scipy import sparse

from sae_persona.errors import DataError

WINDOW = 12
"""Tokens shown on each side of the strongest one."""
_SPAN = np.arange(-WINDOW, WINDOW + 1)


@dataclass(frozen=True)
class Context:
    """A piece of a document around the token on which a latent was strongest there."""

    document: int
    position: int
    """Index in the document of the strongest token."""
    tokens: list[int]
    acts: list[float]
    """The latent's activation on each of ``tokens``."""

    @property
    def strength(self) -> float:
        return max(self.acts)


@dataclass
class _Candidates:
    """Contexts in no order: latent, document, position [m]; tokens, acts [m, 2 * WINDOW + 1]."""

    latent: np.ndarray
    document: np.ndarray
    position: np.ndarray
    tokens: np.ndarray
    acts: np.ndarray

    @property
    def strength(self) -> np.ndarray:
        return self.acts[:, WINDOW]

    def __getitem__(self, rows: np.ndarray) -> "_Candidates":
        return _Candidates(*(part[rows] for part in vars(self).values()))

    def __add__(self, other: "_Candidates") -> "_Candidates":
        return _Candidates(
            *(np.concatenate(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True))
        )


class TopContexts:
    """The strongest contexts of each latent, at most one from a document.

    document  [n_latents, per_latent]                  int64   -1: no context
    position  [n_latents, per_latent]                  int32
    tokens    [n_latents, per_latent, 2 * WINDOW + 1]  int32   -1: beyond the document's ends
    acts      as tokens                                fp32    strongest token in the middle
    """

    def __init__(self, n_latents: int, per_latent: int = 8) -> None:
        shape = (n_latents, per_latent)
        self.document = np.full(shape, -1, np.int64)
        self.position = np.zeros(shape, np.int32)
        self.tokens = np.full((*shape, len(_SPAN)), -1, np.int32)
        self.acts = np.zeros((*shape, len(_SPAN)), np.float32)

    def update(self, documents: Sequence[tuple[int, list[int]]], acts: sparse.csr_matrix) -> None:
        """Add documents, each given by its number and token ids.

        acts  [n, n_latents]   the latents on the documents' tokens, one document after the other
        """
        lengths = [len(ids) for _, ids in documents]
        starts = np.cumsum([0, *lengths])
        if acts.shape != (starts[-1], len(self.document)):
            raise DataError(
                f"{starts[-1]} tokens and {len(self.document)} latents need acts of that shape, got {acts.shape}"
            )
        place, token, latent = self._peaks(acts, np.repeat(np.arange(len(lengths)), lengths))
        if not len(latent):
            return
        around = token[:, None] + _SPAN
        inside = (around >= starts[place, None]) & (around < starts[place + 1, None])
        around = np.where(inside, around, token[:, None])
        ids = np.concatenate([np.asarray(ids, np.int32) for _, ids in documents])
        window = np.asarray(acts[around.ravel(), np.repeat(latent, len(_SPAN))], np.float32).reshape(around.shape)
        self._keep_strongest(
            _Candidates(
                latent=latent,
                document=np.array([number for number, _ in documents], np.int64)[place],
                position=(token - starts[place]).astype(np.int32),
                tokens=np.where(inside, ids[around], np.int32(-1)),
                acts=np.where(inside, window, np.float32(0)),
            )
        )

    def _peaks(self, acts: sparse.csr_matrix, document: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document, token and latent where a latent is at its strongest in a document, if that could be kept."""
        entries = acts.tocoo()
        # one as weak as the last that is kept can still win by its document's number, so ties stay in
        hopeful = (entries.data > 0) & (entries.data >= self.acts[entries.col, -1, WINDOW])
        strength, token, latent = entries.data[hopeful], entries.row[hopeful], entries.col[hopeful]
        order = np.lexsort((token, np.negative(strength), document[token], latent))
        token, latent = token[order], latent[order]
        peak = _changes(latent, document[token])
        return document[token[peak]], token[peak], latent[peak]

    def merge(self, other: "TopContexts") -> None:
        """Add the contexts that another process kept; documents must be numbered apart. Order does not matter."""
        if other.document.shape != self.document.shape:
            raise DataError(f"contexts of shape {other.document.shape} cannot be merged into {self.document.shape}")
        self._keep_strongest(other._of(np.arange(len(self.document))))

    def of(self, latent: int) -> list[Context]:
        """The contexts of one latent, strongest first."""
        kept = self._of(np.array([latent]))
        shown = [tokens >= 0 for tokens in kept.tokens]
        return [
            Context(int(d), int(p), tokens[here].tolist(), acts[here].tolist())
            for d, p, tokens, acts, here in zip(
                kept.document, kept.position, kept.tokens, kept.acts, shown, strict=True
            )
        ]

    def _of(self, latents: np.ndarray) -> _Candidates:
        latent, slot = np.nonzero(self.document[latents] >= 0)
        at = latents[latent], slot
        return _Candidates(at[0], self.document[at], self.position[at], self.tokens[at], self.acts[at])

    def _keep_strongest(self, new: _Candidates) -> None:
        pool = new + self._of(np.unique(new.latent))
        # one a document, then the strongest; equal ones by number, so that the order of merging does not matter
        pool = pool[np.lexsort((pool.position, -pool.strength, pool.document, pool.latent))]
        pool = pool[_changes(pool.latent, pool.document)]
        pool = pool[np.lexsort((pool.document, -pool.strength, pool.latent))]
        slot = np.arange(len(pool.latent)) - np.searchsorted(pool.latent, pool.latent)
        kept, slot = pool[slot < self.document.shape[1]], slot[slot < self.document.shape[1]]
        at = kept.latent, slot
        self.document[at], self.position[at] = kept.document, kept.position
        self.tokens[at], self.acts[at] = kept.tokens, kept.acts

    def to_h5(self, group: h5py.Group) -> None:
        """Write into an empty HDF5 group."""
        for name, part in vars(self).items():
            group.create_dataset(name, data=part, compression="gzip", compression_opts=1)

    @classmethod
    def from_h5(cls, group: Any) -> Self:
        """Read what ``to_h5`` wrote. KeyError if a part is missing."""
        contexts = cls(0)
        for name in vars(contexts):
            setattr(contexts, name, group[name][:])
        return contexts


def _changes(*keys: np.ndarray) -> np.ndarray:
    """Where any of the keys [n] differs from the one before it; the first entry always does."""
    new = np.ones(len(keys[0]), bool)
    new[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return new
