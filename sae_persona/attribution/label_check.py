"""What can be known of labels before a model reads a text: balance, groups, ids, and what leaks from split to split."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sae_persona.activations.dialogues import Dialogue
from sae_persona.attribution.labels import WITHIN, Split, Within, select
from sae_persona.attribution.near_duplicates import near_duplicates
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.examples import unmeasured
from sae_persona.features.pooled import Pooled

SPLITS: tuple[Split, ...] = ("train", "held_out")
GROUPS = ("template", "domain", "author")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What counts as a near duplicate and as a class. ConfigError if a setting is out of its range."""

    threshold: float = 0.8
    """Jaccard similarity of two texts' shingles from which they are near duplicates."""
    words: int = 5
    """Words in a shingle."""
    within: tuple[Within, ...] = ("template", "domain")
    """Labels will be permuted among examples that share these."""
    min_confidence: float = 0.0
    """Labels that are less certain are left out."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1 or self.words < 1 or not 0 <= self.min_confidence <= 1:
            raise ConfigError(
                f"threshold lies above 0 and up to 1, words is at least 1, min_confidence lies between 0 and 1, "
                f"got {self.threshold}, {self.words}, {self.min_confidence}"
            )
        if unknown := sorted(set(self.within) - set(WITHIN)):
            raise ConfigError(f'within takes {", ".join(WITHIN)}, or "" for none of them, got {", ".join(unknown)}')


@dataclass(frozen=True, kw_only=True)
class ClassBalance:
    """Examples of one persona in one split."""

    persona: str
    split: Split
    positive: int
    negative: int
    unlabelled: int
    """Examples of the split that carry other labels only."""
    confidence: float
    """Mean confidence in the labels; 1 where none is said."""
    problem: str
    """Why it cannot be ranked; "" if it can."""


@dataclass(frozen=True, kw_only=True)
class GroupBalance:
    """How many templates, domains or authors each split has, and how many of them both have."""

    group: str
    train: int
    held_out: int
    shared: int


@dataclass(frozen=True, kw_only=True)
class LeakedText:
    """A held-out dialogue and the train dialogue that is most like it, by id or number."""

    held_out: str
    train: str
    similarity: float


@dataclass(frozen=True, kw_only=True)
class LabelCheck:
    """What `check_labels` found."""

    n_texts: int
    n_examples: int
    """Labelled answers and spans."""
    n_hard: int
    n_unsplit: int
    """Labelled texts that name no split, so that their id decides."""
    classes: tuple[ClassBalance, ...]
    groups: tuple[GroupBalance, ...]
    duplicate_ids: tuple[str, ...]
    leaks: tuple[LeakedText, ...]
    threshold: float

    @property
    def holds(self) -> bool:
        """Whether every persona can be ranked, no id stands twice and nothing leaks."""
        return not (self.duplicate_ids or self.leaks or any(part.problem for part in self.classes))

    def __str__(self) -> str:
        width = max(len("personas"), *(len(part.persona) for part in self.classes))
        lines = [
            f"{self.n_texts} texts, {self.n_examples} labelled answers and spans, {self.n_hard} of them hard negatives",
            f"{self.n_unsplit} labelled texts name no split: their ids decide",
            "",
            f"{'persona':{width}} {'split':9} {'with':>7} {'without':>8} {'unlabelled':>11} {'confidence':>11}",
        ]
        for part in self.classes:
            counts = f"{part.positive:7} {part.negative:8} {part.unlabelled:11} {part.confidence:11.3f}"
            lines.append(
                f"{part.persona:{width}} {part.split:9} {counts}" + (f"  {part.problem}" if part.problem else "")
            )
        lines += ["", f"{'':{width}} {'train':>9} {'held-out':>9} {'in both':>9}"]
        lines += [
            f"{part.group + 's':{width}} {part.train:9} {part.held_out:9} {part.shared:9}" for part in self.groups
        ]
        lines += ["", f"ids that stand twice: {_some(self.duplicate_ids)}"]
        alike = [f"{leak.held_out} like {leak.train} ({leak.similarity:.2f})" for leak in self.leaks]
        lines.append(f"held-out texts that are near duplicates of a train text (>= {self.threshold:g}): {_some(alike)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"holds": self.holds, **asdict(self)}


def check_labels(texts: Iterable[str | Dialogue], config: CheckConfig | None = None) -> LabelCheck:
    """Check labelled texts as `measure` and `rank` would take them, without a model.

    A class with fewer than MIN_CLASS examples, or labels that cannot be permuted within their blocks, make a persona's
    problem; a near duplicate counts as a leak if the two stand in different splits. DataError if no text has labels.
    """
    config = config or CheckConfig()
    texts = list(texts)
    pooled = unmeasured(texts)
    if not len(pooled):
        raise DataError(f"none of these {len(texts)} texts has labels: give each row labels {{PERSONA: 0 or 1}}")
    numbers, first = np.unique(pooled.dialogue, return_index=True)
    dialogues, split = [texts[i] for i in numbers], pooled.split[first]
    alike = near_duplicates([said(text) for text in dialogues], threshold=config.threshold, words=config.words)
    given = Counter(text.id for text in texts if isinstance(text, Dialogue) and text.id)
    name = [text.id or str(i) for i, text in zip(numbers, dialogues, strict=True) if isinstance(text, Dialogue)]
    return LabelCheck(
        n_texts=len(texts),
        n_examples=len(pooled),
        n_hard=int(pooled.hard.sum()),
        n_unsplit=sum(isinstance(text, Dialogue) and not text.split for text in dialogues),
        classes=tuple(_class(pooled, persona, part, config) for persona in pooled.personas for part in SPLITS),
        groups=tuple(_group(pooled, group) for group in GROUPS),
        duplicate_ids=tuple(id for id, times in given.items() if times > 1),
        leaks=tuple(
            LeakedText(held_out=name[leak.held_out], train=name[leak.train], similarity=leak.similarity)
            for leak in alike.leaks(split)
        ),
        threshold=config.threshold,
    )


def said(text: str | Dialogue) -> str:
    """All that a text or its messages say."""
    if isinstance(text, str):
        return text
    return "\n".join(message["content"] for message in text.messages) if text.messages else text.text or ""


def _class(pooled: Pooled, persona: str, split: Split, config: CheckConfig) -> ClassBalance:
    column, here = pooled.personas.index(persona), pooled.split == split
    labels = pooled.labels[:, column]
    marked = here & ~np.isnan(labels)
    try:
        select(pooled, persona, split, within=config.within, min_confidence=config.min_confidence)
        problem = ""
    except DataError as error:
        problem = str(error)
    return ClassBalance(
        persona=persona,
        split=split,
        positive=int((labels[marked] >= 0.5).sum()),
        negative=int((labels[marked] < 0.5).sum()),
        unlabelled=int((here & ~marked).sum()),
        confidence=float(pooled.weights[marked, column].mean()) if marked.any() else 1.0,
        problem=problem,
    )


def _group(pooled: Pooled, group: str) -> GroupBalance:
    values = getattr(pooled, group)
    train, held_out = (set(values[pooled.split == split].tolist()) - {""} for split in SPLITS)
    return GroupBalance(group=group, train=len(train), held_out=len(held_out), shared=len(train & held_out))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)}: {', '.join(names[:_SHOWN])}{rest}" if names else "none"
