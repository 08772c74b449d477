"""Which examples show a persona, which do not, and which of them may be swapped."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal, get_args

import numpy as np

from sae_persona.errors import ConfigError, DataError
from sae_persona.features.pooled import Pooled

Split = Literal["train", "held_out"]
Within = Literal["template", "domain", "author", "dialogue"]
WITHIN: tuple[Within, ...] = get_args(Within)

MIN_CLASS = 10
"""Fewest examples of each class: intervals and permutations mean little below it."""
_FEWEST = 2  # below it no interval can be computed at all


@dataclass(frozen=True)
class Selection:
    """The labelled examples of one persona in one split.

    y       [m] bool    the label is at least 0.5
    rows    [m] int64   their rows in Pooled
    blocks  [m] int64   0 to n_blocks - 1; examples of one block differ in nothing that the blocks are made of
    warning what whoever reads a result of it has to know; "" for nothing
    """

    y: np.ndarray
    rows: np.ndarray
    blocks: np.ndarray
    warning: str = ""

    @property
    def counts(self) -> tuple[int, int]:
        """How many show the persona, and how many do not."""
        return int(self.y.sum()), int((~self.y).sum())

    @property
    def n_blocks(self) -> int:
        return int(self.blocks.max()) + 1


def select(
    pooled: Pooled,
    persona: str,
    split: Split,
    *,
    within: Sequence[Within] = ("template", "domain"),
    min_confidence: float = 0.0,
    force: bool = False,
) -> Selection:
    """Pick a persona's examples; blocks are the combinations of ``within`` (none: one block).

    within           of a dialogue with several labelled answers or spans the last one counts: they are not independent,
                     and permuting them as if they were would make chance look like effect. Within "dialogue" all of
                     them count, and are permuted among themselves
    min_confidence   examples whose label is less certain (`Pooled.weights`) are left out; from 0 to 1
    force            take a class with fewer than MIN_CLASS examples, with a warning

    DataError for an unknown persona, a label beyond 0 to 1, a class with fewer than MIN_CLASS examples (2 with
    ``force``), or blocks of one class each; ConfigError for a confidence that is none.
    """
    if persona not in pooled.personas:
        raise DataError(_unknown(persona, pooled.personas))
    column = pooled.personas.index(persona)
    labels = pooled.labels[:, column]
    if not 0 <= min_confidence <= 1:
        raise ConfigError(f"min_confidence lies between 0 and 1, got {min_confidence}")
    if (beyond := labels[(labels < 0) | (labels > 1)]).size:
        raise DataError(f"a label of {persona!r} is {beyond[0]:g}: labels lie between 0 (without) and 1 (with)")
    sure = pooled.weights[:, column] >= min_confidence
    rows = np.flatnonzero(~np.isnan(labels) & sure & (pooled.split == split))
    if "dialogue" not in within:
        _, last = np.unique(pooled.dialogue[rows][::-1], return_index=True)
        rows = np.sort(rows[len(rows) - 1 - last])
    y = labels[rows] >= 0.5
    warning = _few(persona, split, int(y.sum()), int((~y).sum()), min_confidence, force)
    names = np.array([getattr(pooled, name)[rows].astype(str) for name in within])
    blocks = np.unique(names, axis=1, return_inverse=True)[1].ravel() if len(within) else np.zeros(len(rows), np.int64)
    if not _varies(y, blocks):
        raise DataError(
            f"nothing can be permuted: in each of the {blocks.max() + 1} blocks ({' x '.join(within)}) all {split} "
            f"examples are alike in {persona!r}. Ask the same questions with and without it, or use coarser blocks"
        )
    return Selection(y, rows, blocks, warning)


def _few(persona: str, split: str, positive: int, negative: int, min_confidence: float, force: bool) -> str:
    """The warning that a class is small, "" if none is. DataError if it may not be so small."""
    if min(positive, negative) >= MIN_CLASS:
        return ""
    sure = f" at a confidence of {min_confidence:g} or more" if min_confidence else ""
    found = f"{persona!r} has {positive} examples with it and {negative} without in the {split} split{sure}"
    if not force or min(positive, negative) < _FEWEST:
        least = _FEWEST if force else MIN_CLASS
        raise DataError(f"{found}, at least {least} of each are needed: label more dialogues")
    return f"{found}: with fewer than {MIN_CLASS} of each, intervals and p mean little"


def _varies(y: np.ndarray, blocks: np.ndarray) -> bool:
    positive, size = np.bincount(blocks, y), np.bincount(blocks)
    return bool(((positive > 0) & (positive < size)).any())


def _unknown(persona: str, known: tuple[str, ...]) -> str:
    if not known:
        return f"no example is labelled, so {persona!r} cannot be ranked: measure dialogues that carry labels"
    nearest = sorted(known, key=lambda name: -SequenceMatcher(None, persona.lower(), name.lower()).ratio())
    return f"no example is labelled {persona!r}: the labels are {', '.join(nearest)}"
