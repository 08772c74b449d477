"""How misaligned a model is: it answers questions of several domains, a judge reads, rates come with their intervals.

in_domain       questions of the domain that was fine-tuned on
out_of_domain   questions of all others
open            questions of no domain, in which malice shows
valid           answers that are answers at all, over all questions
per_domain      each domain alone
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import LM
from sae_persona.activations.texts import READERS
from sae_persona.errors import DataError
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.arms import plain
from sae_persona.steering.strength import Judge, wilson


@dataclass(frozen=True, eq=False)
class Marks:
    """What the judge found in n answers.

    misaligned, valid, correct   [n] fp64, NaN where it does not say; correct is a fact told as it is
    domain, question             [n] str; an open question has the domain ""
    """

    misaligned: np.ndarray
    valid: np.ndarray
    correct: np.ndarray
    domain: np.ndarray
    question: np.ndarray
    answers: tuple[str, ...]

    def rate(self, rows: np.ndarray | None = None) -> dict[str, Any]:
        """Share of misaligned answers among some of the rows (mask [n] or numbers), with its 95 % interval.

        Wilson's, with answers to one question counted by the design effect. None where the judge says nothing, and
        no ends with fewer questions than tell them.
        """
        return _rate(self.misaligned, self.question, slice(None) if rows is None else rows)

    def part(self, rows: slice) -> "Marks":
        """Those of some answers."""
        names = ("misaligned", "valid", "correct", "domain", "question", "answers")
        return Marks(**{name: getattr(self, name)[rows] for name in names})

    def scores(self, domain: str = "") -> dict[str, Any]:
        """The rates of the module's table, for a model that was fine-tuned on ``domain`` ("": on none)."""
        there = sorted(set(self.domain) - {""})
        is_open, is_in = self.domain == "", (self.domain == domain) & (self.domain != "")
        return {
            "in_domain": self.rate(is_in),
            "out_of_domain": self.rate(~is_open & ~is_in),
            "open": self.rate(is_open),
            "valid": _rate(self.valid, self.question, slice(None)),
            "per_domain": {name: self.rate(self.domain == name) for name in there},
        }


def _rate(scores: np.ndarray, question: np.ndarray, rows: Any) -> dict[str, Any]:
    scores, question = scores[rows], question[rows]
    n = int((~np.isnan(scores)).sum())
    if not n:
        return {"rate": None, "low": None, "high": None, "n": 0}
    found = wilson(scores, question)
    return plain({"rate": found.value, "low": found.low, "high": found.high, "n": n})


def exam(
    lm: LM,
    questions: Sequence[Mapping[str, Any]],
    judge: Judge,
    *,
    domain: str = "",
    config: AnswerConfig | None = None,
) -> dict[str, Any]:
    """Examine a model: rates of misaligned answers as JSON values. Errors as ``marks``.

    questions   rows with ``messages``, ``domain`` ("" or left out where open) and ``trait``: the score of the judge
                that is 1 where the answer is misaligned
    domain      the one that the model was fine-tuned on
    """
    return marks(lm, questions, judge, config=config).scores(domain)


def marks(lm: LM, questions: Sequence[Mapping[str, Any]], judge: Judge, *, config: AnswerConfig | None = None) -> Marks:
    """Let a model answer every question once, and the judge read. DataError for rows that ask nothing."""
    if not questions:
        raise DataError("an exam needs questions, got none")
    for number, row in enumerate(questions):
        messages = row.get("messages")
        if not messages or messages[-1].get("role") != "user" or not row.get("trait"):
            raise DataError(f"question {number} needs messages that end with the user's, and a trait")
    config = config or AnswerConfig(batch=256)
    written = answer(lm, [prompt_tokens(lm, row["messages"]) for row in questions], config)
    asked = [row["messages"][-1]["content"] for row in questions]
    found = [judge(question, one.text) for question, one in zip(asked, written, strict=True)]
    shown = [scores.get(row["trait"]) for scores, row in zip(found, questions, strict=True)]
    return Marks(
        misaligned=_numbers(shown),
        valid=_numbers([scores.get("valid") for scores in found]),
        correct=_numbers([scores.get("correct") for scores in found]),
        domain=np.array([row.get("domain") or "" for row in questions], dtype=object),
        question=np.array(asked, dtype=object),
        answers=tuple(one.text for one in written),
    )


def read_questions(path: str | Path, *, trait: str = "") -> list[dict[str, Any]]:
    """Questions out of a .jsonl file: rows with ``messages`` that end with the user's, ``domain`` and ``trait``.

    trait   of rows that say none

    DataError for a file that is missing, empty or of another kind, and, with the line, for a row that asks nothing.
    """
    path = Path(path)
    if path.suffix != ".jsonl" or not path.is_file():
        raise DataError(f"questions are rows of a .jsonl file, got {path}: give one that is there")
    found = []
    for where, row in READERS[".jsonl"](path):
        messages = row.get("messages") if isinstance(row, dict) else None
        if not messages or messages[-1].get("role") != "user":
            raise DataError(f"{where}: a question needs messages that end with the user's")
        if not (row.get("trait") or trait):
            raise DataError(
                f"{where}: which score is 1 where the answer is misaligned? Give the row a trait, or --trait"
            )
        found.append({**row, "trait": row.get("trait") or trait})
    if not found:
        raise DataError(f"{path} holds no question: give some")
    return found


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)
