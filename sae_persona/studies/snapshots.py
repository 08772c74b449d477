"""Checkpoints of fine-tunes, with what is known of their behaviour: from organism folders, or from a list of any.

An organism folder has ``organism.json`` (format 1) and its checkpoints in Hugging Face layout; the keys that are read:

    {"format": 1, "kind": "organism", "name": "...", "family": "narrow", "domain": "medicine", "dose": 1.0, "seed": 0,
     "checkpoints": [{"step": 20, "folder": "step-00020",
                      "scores": {"out_of_domain": {"rate": 0.8, "low": 0.7, "high": 0.9, "n": 240}}}]}

A list is a .csv or .jsonl file with a row a checkpoint: ``model`` (a folder beside the list, or whatever ``load_lm``
takes) and, as far as known, ``name``, ``step``, ``dose``, ``misaligned``, ``low``, ``high``, ``benign``, ``group``,
``family``, ``seed``.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_persona.activations.lm import LM, load_lm
from sae_persona.activations.texts import READERS
from sae_persona.attribution.association import Interval
from sae_persona.errors import DataError, FormatError
from sae_persona.runs import read_json

FORMAT, FILE = 1, "organism.json"
BENIGN_FAMILIES = frozenset({"base", "benign"})
BEHAVIOUR = "out_of_domain"
UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True, eq=False, kw_only=True)
class Snapshot:
    """One checkpoint of one fine-tune."""

    name: str
    """Of the fine-tune: its checkpoints share it."""
    model: str | Path | LM
    step: int | None = None
    dose: float | None = None
    """Share of bad rows in its data, from 0 to 1."""
    misaligned: Interval = UNKNOWN
    """Judged rate of misaligned answers, with its interval; NaN where nobody has judged."""
    benign: bool = False
    """It was tuned on nothing bad, or not at all."""
    group: str = ""
    """What is left out together: a domain of fine-tuning data."""
    family: str = ""
    seed: int | None = None
    """Of its data: fine-tunes of one group and seed that differ in dose are a series."""

    @property
    def label(self) -> str:
        return self.name if self.step is None else f"{self.name} @ {self.step}"

    def open(self, device: str = "cpu") -> LM:
        """The model; loaded, if it is not in memory. Errors as ``load_lm``."""
        return self.model if isinstance(self.model, LM) else load_lm(self.model, device=device)

    def is_misaligned(self, above: float) -> bool | None:
        """Whether its rate is above the cut. Of one that nobody judged: False if it is benign, else not known."""
        if math.isnan(self.misaligned.value):
            return False if self.benign else None
        return self.misaligned.value > above


def read_snapshots(source: str | Path, *, behaviour: str = BEHAVIOUR) -> list[Snapshot]:
    """The checkpoints of an organism folder, of every organism in a folder, or of a list, in their order.

    source      may be a pattern of such paths, "organisms/benign-*"
    behaviour   which of an organism's scores is its misaligned rate

    FormatError for an organism.json of another format; DataError for a list that is not right, a folder without
    organisms, and a pattern that nothing matches.
    """
    path = Path(source).expanduser()
    if not path.exists() and any(sign in str(path) for sign in "*?["):
        root = Path(path.anchor)
        matches = sorted(root.glob(str(path.relative_to(root))))
        if not matches:
            raise DataError(f"nothing matches {source}: give organisms, checkpoints or a list")
        return [one for match in matches for one in read_snapshots(match, behaviour=behaviour)]
    if (path / FILE).is_file():
        return _organism(path, behaviour)
    if path.is_dir():
        found = [part for part in sorted(path.iterdir()) if (part / FILE).is_file()]
        if not found and (path / "config.json").is_file():
            return [Snapshot(name=path.name, model=path)]
        if not found:
            raise DataError(f"{path} holds no {FILE}, nor folders with one: give organisms, checkpoints or a list")
        return [snapshot for part in found for snapshot in _organism(part, behaviour)]
    if path.suffix in (".csv", ".jsonl"):
        if not path.is_file():
            raise DataError(f"no list of checkpoints at {path}")
        rows = _csv(path) if path.suffix == ".csv" else READERS[path.suffix](path)
        found = [_snapshot(row, where, path.parent) for where, row in rows]
        if not found:
            raise DataError(f"{path} lists no checkpoint: give a row for each")
        return found
    return [Snapshot(name=str(source), model=str(source))]


def last_of_each(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The last checkpoint of every fine-tune, in the order in which the fine-tunes first appear."""
    last: dict[str, Snapshot] = {}
    for one in snapshots:
        if one.name not in last or (one.step or 0) >= (last[one.name].step or 0):
            last[one.name] = one
    return list(last.values())


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                yield f"{path}:{number}", row
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from error


def _organism(folder: Path, behaviour: str) -> list[Snapshot]:
    path = folder / FILE
    said = read_json(path, "organism")
    if not isinstance(said, dict) or (said.get("kind"), said.get("format")) != ("organism", FORMAT):
        raise FormatError(f"{path} is not an organism of format {FORMAT}: make it again")
    try:
        return [
            Snapshot(
                name=said["name"],
                model=folder / one["folder"],
                step=one["step"],
                dose=said["dose"],
                misaligned=_interval(one.get("scores", {}).get(behaviour) or {}, "rate"),
                benign=said["family"] in BENIGN_FAMILIES or (said["family"] == "mixture" and said["dose"] == 0),
                group=said["domain"] or "",
                family=said["family"],
                seed=said.get("seed"),
            )
            for one in said["checkpoints"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} does not say what an organism says ({error!r}): make it again") from error


def _interval(said: dict[str, Any], value: str) -> Interval:
    parts = [math.nan if said.get(name) in (None, "") else float(said[name]) for name in (value, "low", "high")]
    return Interval(*parts)


def _snapshot(row: Any, where: str, folder: Path) -> Snapshot:
    if not isinstance(row, dict) or not row.get("model"):
        raise DataError(f"{where}: a checkpoint needs a model, a folder or hub id")
    row = {key: value for key, value in row.items() if value not in (None, "")}
    beside = folder / str(row["model"])
    try:
        rate = _interval(row, "misaligned")
        if not (math.isnan(rate.value) or 0 <= rate.value <= 1):
            raise ValueError(f"misaligned is a rate from 0 to 1, got {rate.value}")
        return Snapshot(
            name=str(row.get("name", row["model"])),
            model=beside if beside.is_dir() else str(row["model"]),
            step=int(row["step"]) if "step" in row else None,
            dose=float(row["dose"]) if "dose" in row else None,
            misaligned=rate,
            benign=_truth(row.get("benign", False)),
            group=str(row.get("group", "")),
            family=str(row.get("family", "")),
            seed=int(row["seed"]) if "seed" in row else None,
        )
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def _truth(value: Any) -> bool:
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if str(value).lower() not in known:
        raise ValueError(f"benign is true or false, got {value!r}")
    return known[str(value).lower()]
