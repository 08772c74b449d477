"""Texts and dialogues from a file, a data set on disk or any iterable."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sae_persona.activations.axis import axis_rows
from sae_persona.activations.dialogues import Dialogue
from sae_persona.activations.evals import FORMS, evals_rows
from sae_persona.activations.table import csv_rows
from sae_persona.errors import DataError

HUB, EVALS, AXIS = "hub:", "evals:", "axis:"
LABELLED = ("labels", "spans")
"""Fields that make a row with a text a Dialogue."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts in a fixed order that can be gone through any number of times. Made by ``read_texts``."""

    source: Path | Iterable[Any]
    field: str
    first: int = 0
    every: int = 1

    def __iter__(self) -> Iterator[str | Dialogue]:
        for where, row in islice(read_rows(self.source), self.first, None, self.every):
            yield _text(row, where, self.field)

    def share(self, rank: int, world: int) -> "Texts":
        """Every ``world``-th text, from the ``rank``-th on: what one of several processes reads."""
        return replace(self, first=self.first + rank * self.every, every=self.every * world)

    def number(self, i: int) -> int:
        """Which of all the source's texts the i-th of this share is."""
        return self.first + i * self.every


def read_texts(source: str | Path | Iterable[Any] | Texts, *, field: str = "text") -> Texts:
    """Texts of ``source``, read as they are asked for; the first one is read now.

    source   .txt (a text a line; blank lines are skipped), .jsonl, .parquet, .csv (see `table.py`), a folder of such
             files, one written by ``datasets.Dataset.save_to_disk``, hub:ORG/NAME or hub:ORG/NAME:SPLIT, which is
             streamed from the Hugging Face hub, evals:PATH or evals:PATH:answers (anthropics/evals, see `evals.py`),
             axis:PATH (assistant-axis, see `axis.py`), or an iterable of str, Dialogue or rows. A generator is read
             whole
    field    the field of a row that holds the text. Rows with ``messages``, ``labels`` or ``spans`` become a Dialogue

    DataError for a source that is missing, empty or of another kind, and, with the line, for a row that is not right.
    """
    if isinstance(source, Texts):
        return source
    if isinstance(source, str | Path) and str(source).startswith(HUB):
        source = _Hub(*str(source).removeprefix(HUB).split(":", 1))
    elif isinstance(source, str | Path) and str(source).startswith((EVALS, AXIS)):
        source = _Published(*_published(str(source)))
    elif isinstance(source, str | Path):
        source = Path(source).expanduser()
    elif isinstance(source, Iterator):
        source = list(source)  # it could be gone through once only
    texts = Texts(source, field)
    if next(iter(texts), None) is None:
        raise DataError(f"{'the list of texts' if isinstance(source, list) else source} is empty: it needs a text")
    return texts


def _text(row: Any, where: str, field: str) -> str | Dialogue:
    if isinstance(row, str | Dialogue):
        return row
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a text, a row of named fields or a Dialogue is wanted, got {type(row).__name__}")
    if row.get("messages") is not None:
        return Dialogue.from_row(row, where)
    if not isinstance(row.get(field), str):
        raise DataError(
            f"{where} has no text in field {field!r}: its fields are {', '.join(row)}. "
            "Rename it to text, or pass field=NAME to read_texts."
        )
    if any(row.get(name) is not None for name in LABELLED):
        return Dialogue.from_row({**row, "text": row[field]}, where)
    return row[field]


def read_rows(source: Path | Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Each row as it stands, with where that is in words. DataError as in ``read_texts``."""
    if isinstance(source, _Published):
        return source.rows()
    if not isinstance(source, Path):
        return ((f"text {i}", row) for i, row in enumerate(source))
    if not source.exists():
        raise DataError(f"no texts at {source}: there is no such file or folder")
    if source.is_dir():
        return _folder_rows(source)
    if source.suffix not in READERS:
        raise DataError(f"cannot tell what {source} is: texts come as {', '.join(READERS)} or a saved data set")
    return READERS[source.suffix](source)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path):
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
        except (RecursionError, ValueError) as error:  # brackets or digits by the thousand
            raise DataError(f"{where} is not JSON: {str(error).splitlines()[0]}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for i, row in enumerate(rows):
            yield f"{path} row {i}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error


READERS = {".txt": _lines, ".jsonl": _json_rows, ".parquet": _parquet_rows, ".csv": csv_rows}


def _folder_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a saved data set, or of all files of texts in a folder, by name."""
    files = sorted(path for path in folder.iterdir() if path.suffix in READERS)
    if not files or (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        yield from _saved_rows(folder)
        return
    for path in files:
        yield from READERS[path.suffix](path)


@dataclass(frozen=True)
class _Hub:
    """A data set of the Hugging Face hub, or a folder laid out like one, streamed."""

    name: str
    split: str = "train"

    def __iter__(self) -> Iterator[Any]:
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            rows = datasets.load_dataset(self.name, split=self.split, streaming=True)
            yield from rows
        except (OSError, ValueError, DatasetsError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"cannot read {self}: {reason}") from error

    def __str__(self) -> str:
        return f"{HUB}{self.name}:{self.split}"


@dataclass(frozen=True, eq=False)
class _Published:
    """Published persona labels in their own format: a kind, where they are, and in which form they are read."""

    kind: str
    path: Path
    form: str = FORMS[0]

    def rows(self) -> Iterator[tuple[str, Any]]:
        return axis_rows(self.path) if self.kind == AXIS else evals_rows(self.path, self.form, _json_rows)

    def __iter__(self) -> Iterator[Any]:
        return (row for _, row in self.rows())

    def __str__(self) -> str:
        return f"{self.kind}{self.path}"


def _published(source: str) -> tuple[str, Path, str]:
    """Kind, path and form of ``evals:PATH``, ``evals:PATH:FORM`` or ``axis:PATH``."""
    kind = next(kind for kind in (EVALS, AXIS) if source.startswith(kind))
    path, _, form = source.removeprefix(kind).rpartition(":")
    if kind == AXIS or form not in FORMS:
        path, form = source.removeprefix(kind), FORMS[0]
    return kind, Path(path).expanduser(), form


def path_of(source: str | Path) -> Path:
    """The file or folder that a source names; for the hub one that is not there."""
    source = str(source)
    return _published(source)[1] if source.startswith((EVALS, AXIS)) else Path(source).expanduser()


def _saved_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    if (folder / "dataset_dict.json").exists():
        splits = ", ".join(str(part) for part in sorted(folder.iterdir()) if part.is_dir())
        raise DataError(f"{folder} holds several data sets: give one of {splits}")
    if not (folder / "state.json").exists():
        wanted = f"{', '.join(READERS)} files, or the state.json that `datasets.Dataset.save_to_disk` writes"
        raise DataError(f"{folder} is not a data set: a folder of texts has {wanted}")
    for i, row in enumerate(datasets.Dataset.load_from_disk(str(folder))):
        yield f"{folder} row {i}", row
