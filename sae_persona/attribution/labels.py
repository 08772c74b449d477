"""Which examples show a persona, which do not, and which of them may be swapped."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

import numpy as np

from sae_persona.errors import DataError
from sae_persona.features.pooled import Pooled

Split = Literal["train", "held_out"]
Within = Literal["template", "domain", "author"]

MIN_CLASS = 5
"""Fewest examples of each class: intervals and permutations mean little below it."""


@dataclass(frozen=True)
class Selection:
    """The labelled examples of one persona in one split.

    y       [m] bool    the label is at least 0.5
    rows    [m] int64   their rows in Pooled
    blocks  [m] int64   0 to n_blocks - 1; examples of one block differ in nothing that the blocks are made of
    """

    y: np.ndarray
    rows: np.ndarray
    blocks: np.ndarray

    @property
    def counts(self) -> tuple[int, int]:
        """How many show the persona, and how many do not."""
        return int(self.y.sum()), int((~self.y).sum())

    @property
    def n_blocks(self) -> int:
        return int(self.blocks.max()) + 1


def select(
    pooled: Pooled, persona: str, split: Split, *, within: Sequence[Within] = ("template", "domain")
) -> Selection:
    """Pick a persona's examples; blocks are the combinations of ``within`` (none: one block).

    Of a dialogue with several labelled answers the last one counts: answers of one dialogue are not independent, and
    permuting them as if they were would make chance look like effect.
    DataError for an unknown persona, a class with fewer than MIN_CLASS examples, or blocks of one class each.
    """
    if persona not in pooled.personas:
        raise DataError(_unknown(persona, pooled.personas))
    labels = pooled.labels[:, pooled.personas.index(persona)]
    rows = np.flatnonzero(~np.isnan(labels) & (pooled.split == split))
    _, last = np.unique(pooled.dialogue[rows][::-1], return_index=True)
    rows = np.sort(rows[len(rows) - 1 - last])
    y = labels[rows] >= 0.5
    positive, negative = int(y.sum()), int((~y).sum())
    if min(positive, negative) < MIN_CLASS:
        raise DataError(
            f"{persona!r} has {positive} examples with it and {negative} without in the {split} split, "
            f"at least {MIN_CLASS} of each are needed: label more dialogues"
        )
    names = np.array([pooled.template, pooled.domain, pooled.author])[:, rows]
    chosen = names[[("template", "domain", "author").index(name) for name in within]]
    blocks = np.unique(chosen, axis=1, return_inverse=True)[1].ravel() if len(within) else np.zeros(len(rows), np.int64)
    if not _varies(y, blocks):
        raise DataError(
            f"nothing can be permuted: in each of the {blocks.max() + 1} blocks ({' x '.join(within)}) all {split} "
            f"examples are alike in {persona!r}. Ask the same questions with and without it, or use coarser blocks"
        )
    return Selection(y, rows, blocks)


def _varies(y: np.ndarray, blocks: np.ndarray) -> bool:
    positive, size = np.bincount(blocks, y), np.bincount(blocks)
    return bool(((positive > 0) & (positive < size)).any())


def _unknown(persona: str, known: tuple[str, ...]) -> str:
    if not known:
        return f"no example is labelled, so {persona!r} cannot be ranked: measure dialogues that carry labels"
    nearest = sorted(known, key=lambda name: -SequenceMatcher(None, persona.lower(), name.lower()).ratio())
    return f"no example is labelled {persona!r}: the labels are {', '.join(nearest)}"
