"""Labels from a file of their own, put to dialogues by id."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_persona.activations.dialogues import Dialogue
from sae_persona.activations.rows import read_covariates, read_marks
from sae_persona.activations.table import csv_rows
from sae_persona.activations.texts import read_rows
from sae_persona.errors import DataError
from sae_persona.features.examples import Ids

PARTS = ("labels", "weights", "hard", "covariates")


def join_labels(texts: Iterable[str | Dialogue], path: Path) -> list[Dialogue]:
    """Dialogues with what the rows of ``path`` say of them: labels, weights, hard and covariates, by ``id``.

    path   .jsonl or .csv (see `table.py`; it needs no text). A label that is there already is replaced

    DataError, with the line, for a row without an id, with an id that no dialogue has or that stands twice, or with
    nothing to add; and for a dialogue without an id or with another's.
    """
    dialogues: dict[str, Dialogue] = {}
    ids = Ids()
    for number, text in enumerate(texts):
        if not isinstance(text, Dialogue) or not text.id:
            raise DataError(f"text {number} has no id, so no label can be put to it: give each row an id and messages")
        ids.add(text, number)
        dialogues[text.id] = text
    seen: dict[str, str] = {}
    for where, row in csv_rows(path, said=False) if path.suffix == ".csv" else read_rows(path):
        name = _id(row, where)
        if name not in dialogues:
            raise DataError(f"{where}: no dialogue has id {name!r}: the labels are of other texts")
        if name in seen:
            raise DataError(f"{where}: id {name!r} stands twice, first at {seen[name]}: put its labels into one row")
        seen[name] = where
        dialogues[name] = _joined(dialogues[name], row, where)
    return list(dialogues.values())


def _id(row: Any, where: str) -> str:
    if not isinstance(row, dict) or row.get("id") is None:
        raise DataError(f"{where} has no id: a row of labels names the dialogue that it is of")
    return str(row["id"])


def _joined(dialogue: Dialogue, row: dict[str, Any], where: str) -> Dialogue:
    row = {name: row[name] for name in PARTS if row.get(name) is not None}
    if not row:
        raise DataError(f"{where} has nothing to add: give one of {', '.join(PARTS)}")
    found = read_marks(row, where)
    if dialogue.messages and found.get("labels") and not dialogue.unanswered:
        if all(message["role"] != "assistant" for message in dialogue.messages):
            raise DataError(f"{where}: labels belong to the last answer, and dialogue {dialogue.id} has none")
    if "covariates" in row:
        found["covariates"] = {**(dialogue.covariates or {}), **read_covariates(row["covariates"], where)}
    for part in ("labels", "weights"):
        if part in found:
            found[part] = {**(getattr(dialogue, part) or {}), **found[part]}
    return replace(dialogue, **found)
