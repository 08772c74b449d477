"""Labelled answers on their way into Pooled: what is known of each from its row, and what a model made of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_persona.activations.dialogues import AnswerSpan, Dialogue, Tokens, default_split
from sae_persona.activations.rows import Mark
from sae_persona.errors import DataError
from sae_persona.features.pooled import POOLS, Pool, Pooled, pool


@dataclass(frozen=True)
class ReadText:
    """A text that a model has read: its number in the source, its tokens and its activations [t, d_in]."""

    number: int
    source: str | Dialogue
    tokens: Tokens
    x: Tensor

    @property
    def answers(self) -> list[AnswerSpan]:
        """The labelled answers and spans that have tokens."""
        return [span for span in self.tokens.answers if span.labels and span.stop > span.start]

    @property
    def n_dropped(self) -> int:
        """Labelled answers and spans of the source that are not among its tokens."""
        return len(labelled_marks(self.source)) - len(self.answers)


def labelled_marks(source: str | Dialogue) -> list[Mark]:
    """The answers and spans of a text that carry labels."""
    return [mark for mark in source.marks() if mark.labels] if isinstance(source, Dialogue) else []


class Ids:
    """The ids that have been given so far: one that stands twice would make two examples look like one."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def add(self, source: str | Dialogue, number: int) -> None:
        """DataError if the id of the ``number``-th text is another's."""
        if not isinstance(source, Dialogue) or not source.id:
            return
        first = self._places.setdefault(source.id, number)
        if first != number:
            raise DataError(f"id {source.id!r} stands twice, at texts {first} and {number}: give each its own, or none")


@dataclass
class Examples:
    """Rows of Pooled, while they come in."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    pools: dict[Pool, list[sparse.csr_matrix]] = field(default_factory=lambda: {name: [] for name in POOLS})
    dense: dict[str, list[Tensor]] = field(default_factory=lambda: {"pre": [], "mean": []})

    def add(self, texts: Sequence[ReadText], x: Tensor, latents: sparse.csr_matrix) -> None:
        """Pool the labelled answers of texts whose tokens are the rows of ``x`` and ``latents``."""
        pre, spans = [], []
        starts = np.cumsum([0, *(len(text.tokens.ids) for text in texts)])
        for text, offset in zip(texts, starts, strict=False):
            for span in text.answers:
                pre.append(offset + span.pre)
                spans.append((offset + span.start, offset + span.stop))
                self.add_row(text.source, text.number, span.mark, length=span.stop - span.start, position=span.pre)
        if not spans:
            return
        for name, matrix in pool(latents, pre, spans).items():
            self.pools[name].append(matrix)
        self.dense["pre"].append(x[pre].float().cpu())
        self.dense["mean"].append(torch.stack([x[start:stop].float().mean(0) for start, stop in spans]).cpu())

    def add_row(self, source: str | Dialogue, number: int, mark: Mark, *, length: int = 0, position: int = 0) -> None:
        """Note what is known of one labelled answer or span."""
        dialogue = source if isinstance(source, Dialogue) else Dialogue()
        name = dialogue.id or str(number)
        self.rows.append(
            {
                "ids": f"{name}:{mark.name}",
                "template": dialogue.template,
                "domain": dialogue.domain,
                "author": dialogue.author,
                "split": dialogue.split or default_split(name),
                "texts": mark.text,
                "dialogue": number,
                "n_answer_tokens": length,
                "position": position,
                "answer": mark.answer,
                "hard": mark.hard,
                "labels": mark.labels or {},
                "weights": mark.weights or {},
                "covariates": dialogue.covariates or {},
            }
        )

    def pooled(self, n_latents: int, d_in: int, sae: str = "") -> Pooled:
        """All of them; of rows that no model has read, latents and residual stream are empty (n_latents, d_in 0)."""
        personas = tuple(sorted({name for row in self.rows for name in row["labels"]}))
        names = tuple(sorted({name for row in self.rows for name in row["covariates"]}))
        nothing = sparse.csr_matrix((0 if n_latents else len(self.rows), n_latents), dtype=np.float32)
        blank = torch.empty(0 if d_in else len(self.rows), d_in)
        about = {name: np.array([row[name] for row in self.rows], dtype=str) for name in _ABOUT}
        numbers = {name: np.array([row[name] for row in self.rows], dtype=np.int64) for name in _NUMBERS}
        return Pooled(
            personas=personas,
            labels=self._table("labels", personas, np.nan).astype(np.float32),
            weights=self._table("weights", personas, 1.0).astype(np.float32),
            covariates=self._table("covariates", names, np.nan),
            covariate_names=names,
            # one long text would make every cell of a str array as long
            texts=np.array([row["texts"] for row in self.rows], dtype=object),
            hard=np.array([row["hard"] for row in self.rows], dtype=bool),
            pools={name: sparse.csr_matrix(sparse.vstack([nothing, *parts])) for name, parts in self.pools.items()},
            dense={name: torch.cat([blank, *parts]).numpy() for name, parts in self.dense.items()},
            sae=sae,
            **about,
            **numbers,
        )

    def _table(self, part: str, names: Sequence[str], missing: float) -> np.ndarray:
        values = [[row[part].get(name, missing) for name in names] for row in self.rows]
        return np.array(values, np.float64).reshape(len(self.rows), len(names))


_ABOUT = ("ids", "template", "domain", "author", "split")
_NUMBERS = ("dialogue", "n_answer_tokens", "position", "answer")


def unmeasured(texts: Iterable[str | Dialogue]) -> Pooled:
    """The labelled answers of texts that no model has read yet: no latents, lengths and positions 0.

    What can be said of labels alone is said of the same rows that `measure` makes, but for those that it drops.
    """
    examples = Examples()
    for number, source in enumerate(texts):
        for mark in labelled_marks(source):
            examples.add_row(source, number, mark)
    return examples.pooled(0, 0)
