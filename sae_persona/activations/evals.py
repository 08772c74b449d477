"""Persona files of anthropics/evals as rows: statements that a persona would or would not make, or Yes/No answers.

A line has ``question``, ``statement``, ``label_confidence``, ``answer_matching_behavior`` and
``answer_not_matching_behavior`` (Perez et al., 2022, 2212.09251). The persona is the file's name.

    statements   the statement as a plain text, labelled 1 where the persona says Yes to it
    answers      the question with each of its answers, labelled 1 where it is the persona's. The prompts of the two are
                 the same, so only what is pooled over the answer can differ. Both are in one split
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sae_persona.activations.dialogues import default_split
from sae_persona.errors import DataError

FORMS = ("statements", "answers")
MATCHING, OTHER = "answer_matching_behavior", "answer_not_matching_behavior"

Rows = Iterator[tuple[str, Any]]


def evals_rows(path: Path, form: str, read: Callable[[Path], Rows]) -> Rows:
    """Rows of one file, or of each ``.jsonl`` in a folder, with where each stands.

    read   the lines of a JSONL file, parsed

    DataError for a form or path that there is not, and, with the line, for a row that is not of this format.
    """
    if form not in FORMS:
        raise DataError(f"evals come as {' or '.join(FORMS)}, got {form!r}")
    paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not paths or not path.exists():
        raise DataError(
            f"no evals at {path}: give a .jsonl file of anthropics/evals or a folder of them, then perhaps :answers"
        )
    for file in paths:
        for number, (where, row) in enumerate(read(file)):
            _check(row, where)
            about = {"domain": file.stem, "id": f"{file.stem}-{number}"}
            make = _statement if form == "statements" else _answers
            for made in make(row, file.stem, about, where):
                yield where, made


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict) or not isinstance(row.get(MATCHING), str):
        raise DataError(f"{where} is not a row of anthropics/evals: it has no text {MATCHING!r}")
    confidence = row.get("label_confidence", 1.0)
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        raise DataError(f"{where}: label_confidence lies between 0 and 1, got {confidence!r}")


def _labels(row: dict[str, Any], persona: str, shows: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"labels": {persona: float(shows)}}
    return found | ({"weights": {persona: row["label_confidence"]}} if "label_confidence" in row else {})


def _statement(row: dict[str, Any], persona: str, about: dict[str, str], where: str) -> Iterator[dict[str, Any]]:
    if not isinstance(row.get("statement"), str):
        raise DataError(f"{where} has no statement: read this file as evals:PATH:answers")
    answer = row[MATCHING].strip().lower()
    if answer not in ("yes", "no"):
        raise DataError(f"{where}: a statement's answer is Yes or No, got {row[MATCHING]!r}: read it as answers")
    yield {"text": row["statement"], "template": "statement", **about, **_labels(row, persona, answer == "yes")}


def _answers(row: dict[str, Any], persona: str, about: dict[str, str], where: str) -> Iterator[dict[str, Any]]:
    other = row.get(OTHER)
    others: list[Any] = other if isinstance(other, list) else [other]
    if not isinstance(row.get("question"), str) or not others or not all(isinstance(text, str) for text in others):
        raise DataError(f"{where}: an answer needs the question and {OTHER!r}, both text")
    split = default_split(about["id"])
    frame = row["question"].partition("\n")[0]
    for i, text in enumerate([row[MATCHING], *others]):
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": text.strip()}]
        # labels are permuted among those that give the same answer, so the answer itself tells nothing
        yield {
            "messages": messages,
            "template": f"{frame} {text.strip()}",
            "split": split,
            **about,
            "id": f"{about['id']}-{i}",
            **_labels(row, persona, i == 0),
        }
