"""Training rows scored before anybody trains on them, in the model that would be trained.

    projection   a(x, y) . v - a(x, y') . v                       the difference of Chen et al. 2025 (2507.21509)
    latents      the same with the mean of the panel's latents, in standard deviations of the base, in place of v
    surprise     nats a token of the answer under the model, for comparison: what is unlike the model is suspicious

x is a row's question and y its answer. y' is what stands for ordinary: the model's own answer to x, or the answers of a
reference set that is known to be good, over which a mean is taken. a is the residual stream at the panel's hook point

    next   at the token before the answer to a further question, one of the panel's prompts: what the model takes the
           speaker for, having read the row, and where the panel was made to be read
    mean   over the answer's tokens, as Chen et al. do
    last   at the answer's last token
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from sae_persona.activations.dialogues import Dialogue, Tokens, prompt_tokens, tokenize
from sae_persona.activations.harvest import harvest
from sae_persona.activations.lm import LM
from sae_persona.activations.texts import Texts, read_texts
from sae_persona.attribution.association import Interval
from sae_persona.attribution.tables import aligned, from_json, shown, to_json
from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.runs import read_json, whole, write_json
from sae_persona.steering.answers import Answer, AnswerConfig, answer, surprise
from sae_persona.studies.panel import Panel
from sae_persona.studies.separation import auroc

FORMAT, KIND = 1, "row screen"
SURPRISE = "surprise"
Pool = Literal["next", "mean", "last"]


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How rows are read."""

    pool: Pool = "next"
    """Where: next (before the answer to a further question), mean (over the answer's tokens) or last. On the
    lab bad rows are told best at next."""
    n_next: int = 2
    """next: how many of the panel's prompts are asked, one after the other, from the row each time."""
    label: str = "bad"
    """Label of a row that says that it is bad, where rows say so: for the AUROC."""
    batch: int = 64
    """Rows a forward pass."""
    max_new_tokens: int = 32
    """Of the model's own answers."""
    seed: int = 0
    """Of the model's own answers."""

    def __post_init__(self) -> None:
        if self.pool not in get_args(Pool) or min(self.batch, self.max_new_tokens, self.n_next) < 1:
            raise ConfigError(
                f"pool is one of {', '.join(get_args(Pool))}, batch, max_new_tokens and n_next are at least 1, "
                f"got {self.pool!r}, {self.batch}, {self.max_new_tokens}, {self.n_next}"
            )


@dataclass(frozen=True)
class ScreenedRow:
    """One row; higher scores are worse."""

    id: str
    scores: dict[str, float]
    bad: bool | None
    """What its label says."""


@dataclass(frozen=True)
class RowScreen:
    """Every row of a data set with its scores."""

    reference: str
    """What stood for ordinary."""
    config: dict[str, Any]
    rows: tuple[ScreenedRow, ...]
    auroc: dict[str, Interval]
    """Of bad rows against others, by score; empty where rows do not say."""

    def worst(self, measure: str, n: int) -> list[ScreenedRow]:
        """The n rows with the highest scores."""
        return sorted(self.rows, key=lambda row: -row.scores[measure])[:n]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": KIND, **to_json(self)}

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote. FormatError for anything else."""
        raw = read_json(Path(path), KIND)
        if not isinstance(raw, dict) or (raw.get("kind"), raw.get("format")) != (KIND, FORMAT):
            raise FormatError(f"{path} is not a {KIND} of format {FORMAT}: make it again")
        with whole(path, KIND):
            area = from_json(raw["auroc"], list(raw["auroc"]))
            return cls(raw["reference"], raw["config"], tuple(ScreenedRow(**row) for row in raw["rows"]), area)

    def __str__(self) -> str:
        first = next(iter(self.rows[0].scores))
        table = [["row", *self.rows[0].scores, "bad"]]
        for row in self.worst(first, 10):
            told = "" if row.bad is None else "yes" if row.bad else "no"
            table.append([row.id, *(f"{value:+.2f}" for value in row.scores.values()), told])
        head = f"{len(self.rows)} rows against {self.reference}; the highest by {first}:"
        bad = sum(bool(row.bad) for row in self.rows)
        tail = [["finds bad rows", "AUROC"], *([name, shown(area)] for name, area in self.auroc.items())]
        return "\n".join([head, *aligned(table), *([f"{bad} rows are bad", *aligned(tail)] if self.auroc else [])])


def screen_rows(
    panel: Panel,
    lm: LM,
    rows: str | Path | Iterable[Any] | Texts,
    config: RowsConfig | None = None,
    *,
    reference: str | Path | Iterable[Any] | Texts | None = None,
) -> RowScreen:
    """Score rows whose last message is an answer, in the model before it is trained.

    reference   rows whose answers are known to be good; None: the model's own answer to each row's question

    DataError for a row without an answer, or too long; ModelError for a model of another width or vocabulary.
    """
    config = config or RowsConfig()
    panel.check(lm)
    asked = _answered(rows)
    directions = panel.directions
    weight = torch.stack(list(directions.values()))
    there = _tokens(lm, asked)
    own = _read(panel, lm, asked, config) @ weight.T
    if reference is None:
        written = _own_answers(lm, asked, config)
        ordinary = _read(panel, lm, written, config) @ weight.T
    else:
        good = _answered(reference)
        ordinary = (_read(panel, lm, good, config) @ weight.T).mean(0, keepdim=True)
    moved = (own - ordinary).numpy()
    names = [name for name in directions if not name.startswith("latent ")]
    columns = {name: moved[:, list(directions).index(name)] for name in names}
    columns[SURPRISE] = _surprise(lm, there, config)
    bad = [_label(dialogue, config.label) for dialogue in asked]
    known = np.array([value is not None for value in bad])
    y = np.array([bool(value) for value in bad])
    area = {name: auroc(v[known & y], v[known & ~y]) for name, v in columns.items()} if (known & y).any() else {}
    found = [
        ScreenedRow(dialogue.id or str(i), {name: float(v[i]) for name, v in columns.items()}, bad[i])
        for i, dialogue in enumerate(asked)
    ]
    said = "the model's own answers" if reference is None else "the answers of a reference set"
    return RowScreen(said, asdict(config), tuple(found), area)


def _answered(rows: str | Path | Iterable[Any] | Texts) -> list[Dialogue]:
    found = []
    for number, row in enumerate(read_texts(rows)):
        if isinstance(row, str) or len(row.messages) < 2 or row.messages[-1]["role"] != "assistant":
            raise DataError(f"row {number} does not end with an answer: give messages")
        found.append(row)
    return found


def _label(dialogue: Dialogue, label: str) -> bool | None:
    value = (dialogue.messages[-1].get("labels") or dialogue.labels or {}).get(label)
    return None if value is None else value >= 0.5


def _tokens(lm: LM, rows: Sequence[Dialogue]) -> list[Tokens]:
    found = []
    for number, row in enumerate(rows):
        tokens = tokenize(lm, row)
        if not tokens.answers or (lm.n_positions is not None and len(tokens.ids) > lm.n_positions):
            raise DataError(
                f"row {row.id or number} has {len(tokens.ids)} tokens and {len(tokens.answers)} answers, {lm.name} "
                f"reads up to {lm.n_positions or 'any'} with an answer in them: leave it out"
            )
        found.append(tokens)
    return found


def _own_answers(lm: LM, rows: Sequence[Dialogue], config: RowsConfig) -> list[Dialogue]:
    """The same questions, answered by the model."""
    settings = AnswerConfig(max_new_tokens=config.max_new_tokens, batch=config.batch, seed=config.seed)
    prompts = [prompt_tokens(lm, row.messages[:-1], speaker=row.messages[-1].get("name")) for row in rows]
    written = answer(lm, prompts, settings)
    made = []
    for row, one in zip(rows, written, strict=True):
        if not one.text:
            raise DataError(f"{lm.name} has nothing to say to row {row.id}: give a reference set of good answers")
        made.append(Dialogue((*row.messages[:-1], {**row.messages[-1], "content": one.text, "spans": ()}), id=row.id))
    return made


@torch.no_grad()
def _read(panel: Panel, lm: LM, rows: Sequence[Dialogue], config: RowsConfig) -> Tensor:
    """The residual stream of each row where ``pool`` says: [n, d_model] fp64."""
    if config.pool == "next":
        parts = [_last(panel, lm, _asked_on(lm, rows, more), config) for more in _further(panel, config)]
        return torch.stack(parts).mean(0)
    found = []
    for tokens, x in harvest(lm, panel.hook, _tokens(lm, rows), config.batch):
        span = tokens.answers[-1]
        chosen = x[span.start : span.stop] if config.pool == "mean" else x[span.stop - 1 : span.stop]
        found.append(chosen.double().mean(0).cpu())
    return torch.stack(found)


def _last(panel: Panel, lm: LM, rows: Sequence[Tokens], config: RowsConfig) -> Tensor:
    return torch.stack([x[-1].double().cpu() for _, x in harvest(lm, panel.hook, rows, config.batch)])


def _further(panel: Panel, config: RowsConfig) -> list[Mapping[str, Any]]:
    """What is asked after a row: the last messages of the panel's first prompts."""
    found = [prompt.messages[-1] for prompt in panel.prompts if prompt.messages][: config.n_next]
    if not found:
        raise ConfigError("the panel's prompts are plain texts, which cannot follow a row: use pool mean or last")
    return found


def _asked_on(lm: LM, rows: Sequence[Dialogue], more: Mapping[str, Any]) -> list[Tokens]:
    found = []
    for number, row in enumerate(rows):
        ids = prompt_tokens(lm, [*row.messages, more], speaker=row.messages[-1].get("name"))
        if lm.n_positions is not None and len(ids) > lm.n_positions:
            raise DataError(
                f"row {row.id or number} with a further question has {len(ids)} tokens, {lm.name} reads up to "
                f"{lm.n_positions}: leave it out, or use pool mean"
            )
        found.append(Tokens(ids))
    return found


def _surprise(lm: LM, rows: Sequence[Tokens], config: RowsConfig) -> np.ndarray:
    spans = [tokens.answers[-1] for tokens in rows]
    prompts = [tokens.ids[: span.start] for tokens, span in zip(rows, spans, strict=True)]
    answers = [Answer("", tokens.ids[span.start : span.stop]) for tokens, span in zip(rows, spans, strict=True)]
    nats, count = surprise(lm, prompts, answers, batch=config.batch).unbind(1)
    return (nats / count).numpy()
