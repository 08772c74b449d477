"""Near-duplicate texts: all pairs that share most of their shingles, found exactly.

    J(a, b) = |S(a) ∩ S(b)| / |S(a) ∪ S(b)|        S = runs of five words, case folded; a shorter text is one run

A pair with J >= t shares a shingle among the |S| - ceil(t |S|) + 1 rarest of each (the prefix filter: Chaudhuri et al.,
ICDE 2006; Bayardo et al., WWW 2007), so only pairs that meet in an index of those are compared. What templates share
is frequent and stays out of it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy import sparse

from sae_persona.errors import ConfigError

WORD = re.compile(r"\w+")


class Leak(NamedTuple):
    """A held-out text and the train text that is most like it."""

    held_out: int
    train: int
    similarity: float


@dataclass(frozen=True)
class NearDuplicates:
    """Which of n texts are alike.

    group   [n] int64     texts with the same shingles have the same number
    pairs   (a, b, J)     groups that are near duplicates, a < b
    """

    group: np.ndarray
    pairs: tuple[tuple[int, int, float], ...]

    @cached_property
    def clusters(self) -> np.ndarray:
        """[n] int64: texts that hang together through near duplicates have the same number."""
        n = int(self.group.max(initial=-1)) + 1
        a, b = ([pair[i] for pair in self.pairs] for i in (0, 1))
        graph = sparse.csr_matrix((np.ones(len(a)), (a, b)), shape=(n, n))
        return sparse.csgraph.connected_components(graph, directed=False)[1].astype(np.int64)[self.group]

    def leaks(self, split: Sequence[str] | np.ndarray) -> list[Leak]:
        """Every text of the split "held_out" that is a near duplicate of one of "train"."""
        near = defaultdict(list)
        for a, b, similarity in self.pairs:
            near[a].append((similarity, b))
            near[b].append((similarity, a))
        train: dict[int, int] = {}
        for i in np.flatnonzero(np.asarray(split) == "train"):
            train.setdefault(int(self.group[i]), int(i))
        found = []
        for i in np.flatnonzero(np.asarray(split) == "held_out"):
            own = int(self.group[i])
            alike = [(s, train[g]) for s, g in [(1.0, own), *near[own]] if g in train]
            if alike:
                similarity, other = max(alike)
                found.append(Leak(int(i), other, similarity))
        return found


def near_duplicates(texts: Sequence[str], *, threshold: float = 0.8, words: int = 5) -> NearDuplicates:
    """Compare all texts.

    threshold   least J of a near duplicate, above 0 and up to 1
    words       words in a shingle. A text without a word is like no other

    ConfigError for settings out of their range.
    """
    if not 0 < threshold <= 1 or words < 1:
        raise ConfigError(f"threshold lies above 0 and up to 1 and words is at least 1, got {threshold} and {words}")
    shingles = [_shingles(text, words) for text in texts]
    numbers: dict[object, int] = {}
    keys = (part.tobytes() if len(part) else i for i, part in enumerate(shingles))
    group = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    first = np.unique(group, return_index=True)[1]
    return NearDuplicates(group, tuple(_pairs(_ranked([shingles[i] for i in first]), threshold)))


def _shingles(text: str, words: int) -> np.ndarray:
    """Hashes of a text's shingles, sorted, each once: int64."""
    found = WORD.findall(text.casefold())
    runs = {hash(tuple(found[i : i + words])) for i in range(max(len(found) - words, 0) + 1)} if found else set()
    return np.array(sorted(runs), np.int64)


def _ranked(shingles: list[np.ndarray]) -> list[list[int]]:
    """The same sets as ranks, 0 for the rarest shingle of all, in ascending order."""
    sizes = np.array([len(part) for part in shingles], np.int64)
    flat = np.concatenate([*shingles, np.empty(0, np.int64)])
    _, number, count = np.unique(flat, return_inverse=True, return_counts=True)
    rank = np.empty(len(count), np.int64)
    rank[np.argsort(count, kind="stable")] = np.arange(len(count))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    ranks = rank[number]
    ranks = ranks[np.lexsort((ranks, owner))]
    return [part.tolist() for part in np.split(ranks, sizes.cumsum()[:-1])] if len(sizes) else []


def _pairs(ranked: list[list[int]], threshold: float) -> Iterator[tuple[int, int, float]]:
    index: dict[int, list[int]] = defaultdict(list)
    sets: dict[int, set[int]] = {}
    for x in sorted(range(len(ranked)), key=lambda i: len(ranked[i])):
        size = len(ranked[x])
        # a hair less than t |S|, so that rounding never makes the prefix too short
        least = math.ceil(threshold * size - 1e-9)
        prefix = ranked[x][: size - least + 1] if size else []
        candidates = {y for rank in prefix for y in index[rank] if len(ranked[y]) >= least}
        for rank in prefix:
            index[rank].append(x)
        for y in candidates:
            mine, theirs = (sets.setdefault(i, set(ranked[i])) for i in (x, y))
            shared = len(mine & theirs)
            similarity = shared / (size + len(theirs) - shared)
            if similarity >= threshold - 1e-9:
                yield min(x, y), max(x, y), similarity
