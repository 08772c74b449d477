"""CSV files of labelled texts as rows: what is said, what is known of it, and a column for each label.

text                          a plain text; or prompt and answer, perhaps with system: a chat
id template domain author split hard   as in a row of JSON
weight                        confidence in all the row's labels; weight:NAME in one
covariate:NAME                a number that may explain a latent
#ANYTHING                     left out
any other, or label:NAME      a label: a number, or nothing where it is not known
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_persona.errors import DataError

SAID = ("text", "prompt", "answer", "system")
ABOUT = ("id", "template", "domain", "author", "split")
SKIPPED = "#"


def csv_rows(path: Path, *, said: bool = True) -> Iterator[tuple[str, Any]]:
    """Rows with where each stands. A row without labels is a plain text.

    said   the file has the texts, not labels alone

    DataError for a header without texts or with a name twice and, with the line, for a row of another width, an empty
    answer, or a label that is not a number.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check(header, path, said)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    where = f"{path}:{reader.line_num}"
                    yield where, _row(header, cells, where, said)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num} is not CSV: {error}") from error


def _check(header: list[str], path: Path, said: bool) -> None:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path} has two columns named {twice[0]!r}: rename one")
    if said and "text" not in header and not {"prompt", "answer"} <= set(header):
        raise DataError(f"{path} has columns {', '.join(header) or 'none'}: it needs text, or prompt and answer")


def _row(header: list[str], cells: list[str], where: str, said: bool) -> dict[str, Any]:
    if len(cells) != len(header):
        raise DataError(f"{where} has {len(cells)} cells, the header {len(header)}: quote cells with commas in them")
    given = {name: cell for name, cell in zip(header, cells, strict=True) if not name.startswith(SKIPPED)}
    row: dict[str, Any] = _said(given, where) if said else {}
    row |= {name: given[name] for name in ABOUT if given.get(name)}
    parts: dict[str, dict[str, float]] = {"label": {}, "weight": {}, "covariate": {}}
    for column, cell in given.items():
        if column in (*SAID, *ABOUT, "hard", "weight") or not cell.strip():
            continue
        kind, _, name = column.rpartition(":")
        kind, name = (kind, name) if kind in parts else ("label", column)
        parts[kind][name] = _number(cell, column, where)
    if parts["label"]:
        row["labels"] = parts["label"]
        whole = given.get("weight", "").strip()
        weights = dict.fromkeys(row["labels"], _number(whole, "weight", where)) if whole else {}
        # a confidence in a label that this row leaves out says nothing
        row["weights"] = weights | {name: value for name, value in parts["weight"].items() if name in row["labels"]}
    if given.get("hard", "").strip():
        row["hard"] = _number(given["hard"], "hard", where)
    return row | ({"covariates": parts["covariate"]} if parts["covariate"] else {})


def _said(given: dict[str, str], where: str) -> dict[str, Any]:
    if given.get("text"):
        return {"text": given["text"]}
    if not given.get("prompt") or not given.get("answer"):
        raise DataError(f"{where} has no text, or no prompt and answer: fill them in, or leave the row out")
    said = (("system", given.get("system")), ("user", given["prompt"]), ("assistant", given["answer"]))
    return {"messages": [{"role": role, "content": text} for role, text in said if text]}


def _number(cell: str, column: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise DataError(
            f"{where}: column {column!r} is taken for a label or number, and {cell[:30]!r} is none: "
            f"name it {SKIPPED}{column} to leave it out"
        ) from None
