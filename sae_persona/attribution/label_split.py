"""Deal labelled dialogues to train and held-out: no template (domain, author), prompt or near duplicate is in both."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from scipy import sparse

from sae_persona.activations.dialogues import Dialogue
from sae_persona.attribution.label_check import SPLITS, said
from sae_persona.attribution.labels import MIN_CLASS
from sae_persona.attribution.near_duplicates import near_duplicates
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.examples import Ids, labelled_marks

By = Literal["template", "domain", "author", "id"]
Leaks = Literal["together", "drop"]


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How dialogues are dealt. ConfigError if a setting is out of its range."""

    by: By = "template"
    """What is kept whole: all dialogues of a template, a domain or an author go to one split; id: each on its own."""
    held_out: float = 0.5
    """Share of the dialogues, and of each class, that is to be held out; groups are whole, so it is met nearly."""
    leaks: Leaks = "together"
    """Near duplicates go to one split together, or those of a train text are dropped from held-out."""
    threshold: float = 0.8
    """Jaccard similarity of two texts' shingles from which they are near duplicates."""
    words: int = 5
    """Words in a shingle."""
    seed: int = 0
    """Seed of the order in which groups are dealt."""

    def __post_init__(self) -> None:
        if self.by not in get_args(By) or self.leaks not in get_args(Leaks):
            raise ConfigError(
                f"by is one of {', '.join(get_args(By))} and leaks one of {', '.join(get_args(Leaks))}, "
                f"got {self.by!r} and {self.leaks!r}"
            )
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out lies between 0 and 1, got {self.held_out}")


def split_dialogues(texts: Iterable[str | Dialogue], config: SplitConfig | None = None) -> list[Dialogue]:
    """The labelled dialogues with their splits set anew; what has no labels is left out.

    Groups are dealt in random order, the large ones first, each to the split that is further from its share of the
    classes in the group (after Sechidis et al., 2011, who stratify many labels so).
    Answers to one prompt are never parted. DataError for a dialogue that does not say what it is dealt by, an id that
    stands twice, or if all hang together.
    """
    config = config or SplitConfig()
    dialogues = [text for text in texts if isinstance(text, Dialogue) and labelled_marks(text)]
    if not dialogues:
        raise DataError("none of these texts has labels: give each row labels {PERSONA: 0 or 1}")
    ids = Ids()
    for number, text in enumerate(dialogues):
        ids.add(text, number)
    alike = near_duplicates([said(text) for text in dialogues], threshold=config.threshold, words=config.words)
    whole = _whole(dialogues, config, alike.clusters if config.leaks == "together" else None)
    split = np.where(_dealt(whole, _counts(dialogues), config), "held_out", "train")
    leaked = {leak.held_out for leak in alike.leaks(split)}
    return [replace(text, split=str(split[i])) for i, text in enumerate(dialogues) if i not in leaked]


def scarce(dialogues: Iterable[Dialogue]) -> list[str]:
    """The personas that cannot be ranked in these splits: one has fewer than MIN_CLASS examples with or without it."""
    found = Counter(
        (persona, dialogue.split, mark >= 0.5)
        for dialogue in dialogues
        for part in labelled_marks(dialogue)
        for persona, mark in (part.labels or {}).items()
    )
    classes = [(split, shows) for split in SPLITS for shows in (True, False)]
    personas = sorted({persona for persona, _, _ in found})
    return [name for name in personas if min(found[name, *one] for one in classes) < MIN_CLASS]


def _whole(dialogues: list[Dialogue], config: SplitConfig, clusters: np.ndarray | None) -> np.ndarray:
    """Which dialogues must stay together: a number for each, [n] int64 from 0."""
    n = len(dialogues)
    own = np.arange(n)
    if config.by != "id":
        names = [getattr(text, config.by) for text in dialogues]
        if without := [i for i, name in enumerate(names) if not name]:
            where = dialogues[without[0]].id or f"labelled dialogue {without[0]}"
            raise DataError(
                f"{len(without)} of {n} dialogues have no {config.by}, {where} the first: name it, or split by id"
            )
        own = np.unique(names, return_inverse=True)[1]
    sides = [own, _prompts(dialogues), *([] if clusters is None else [clusters])]
    # each dialogue hangs on its group, its prompt and its cluster: nodes n, 2 n and 3 n on
    hubs = np.concatenate([side + (i + 1) * n for i, side in enumerate(sides)])
    size = (1 + len(sides)) * n
    graph = sparse.csr_matrix((np.ones(len(hubs)), (np.tile(np.arange(n), len(sides)), hubs)), shape=(size, size))
    _, whole = np.unique(sparse.csgraph.connected_components(graph, directed=False)[1][:n], return_inverse=True)
    if not whole.any():
        raise DataError(
            f"all {n} dialogues hang together, by their {config.by} or as near duplicates: split by something finer, "
            f"raise --threshold, or drop leaks"
        )
    return whole


def _prompts(dialogues: list[Dialogue]) -> np.ndarray:
    """Which dialogues answer one and the same prompt: a number for each, [n] from 0; a plain text is by itself."""
    numbers: dict[object, int] = {}
    found = []
    for i, text in enumerate(dialogues):
        before = text.messages if text.unanswered else text.messages[:-1]
        prompt = tuple((message["role"], message.get("name"), message["content"]) for message in before)
        found.append(numbers.setdefault(prompt or i, len(numbers)))
    return np.array(found, np.int64)


def _counts(dialogues: list[Dialogue]) -> np.ndarray:
    """What is dealt in equal shares: dialogues and, of each persona, examples with and without it: [n, 1 + 2 p]."""
    marks = [[mark.labels or {} for mark in labelled_marks(text)] for text in dialogues]
    personas = {
        name: i for i, name in enumerate(sorted({name for part in marks for labels in part for name in labels}))
    }
    counts = np.zeros((len(dialogues), 1 + 2 * len(personas)))
    counts[:, 0] = 1
    for row, part in zip(counts, marks, strict=True):
        for labels in part:
            for name, mark in labels.items():
                row[1 + 2 * personas[name] + (mark >= 0.5)] += 1
    return counts


def _dealt(whole: np.ndarray, counts: np.ndarray, config: SplitConfig) -> np.ndarray:
    """Whether each dialogue is held out: [n] bool."""
    n = int(whole.max()) + 1
    groups = np.zeros((n, counts.shape[1]))
    np.add.at(groups, whole, counts)
    groups /= groups.sum(0).clip(1)  # each group's share of a class
    order = np.random.default_rng(config.seed).permutation(n)
    order = order[np.argsort(-groups[order, 0], kind="stable")]
    shares = np.array([1 - config.held_out, config.held_out])
    have = np.zeros((2, counts.shape[1]))
    to = np.zeros(n, bool)
    for group in order:
        lacks = (1 - have / shares[:, None]) @ groups[group]
        to[group] = lacks[1] > lacks[0]
        have[int(to[group])] += groups[group]
    if to.all() or not to.any():
        to[order[-1]] = not to[order[-1]]
    return to[whole]
