"""The ledgers: CSV files to which every benchmark appends, a row a measurement."""

import csv
import os
import subprocess
from pathlib import Path


def commit() -> str:
    """What was measured: BENCH_COMMIT of the environment, for a copy of the files without git; else git's word."""
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git at all
        return "none"
    return answer.stdout.strip() or "none"


def append(path: Path, row: dict[str, object]) -> None:
    """Add the row, under a header if the file is new. ValueError if its columns are not the file's."""
    new = not path.exists()
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if header != list(row):
            raise ValueError(f"{path} has the columns {header}, the row has {list(row)}: move the old file away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
