"""The labelled parts of a row of a data set: labels, confidence, spans, covariates. Each is checked as it is read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sae_persona.errors import DataError


@dataclass(frozen=True, eq=False)
class Span:
    """Characters ``start`` up to but not with ``stop`` of a text or a message, with labels of their own."""

    start: int
    stop: int
    labels: dict[str, float]
    weights: dict[str, float] | None = None
    hard: bool = False


@dataclass(frozen=True, eq=False)
class Mark:
    """One answer of a dialogue, or a span of one, and what is known of it.

    text      its characters; "" for an answer that is awaited
    answer    number of the answer in the dialogue, from 0
    message   number of the message that it stands in; None in a plain text
    span      its first character in that message or text, and the one after its last; None for a whole answer
    labels    persona -> mark;  weights   persona -> confidence in it, 1 where not said
    hard      a hard negative: it looks like the persona, and is not
    """

    text: str
    answer: int = 0
    message: int | None = None
    span: tuple[int, int] | None = None
    labels: dict[str, float] | None = None
    weights: dict[str, float] | None = None
    hard: bool = False

    @property
    def name(self) -> str:
        """Which of the dialogue's it is, such as 0, or 0[12:40] for a span."""
        return str(self.answer) if self.span is None else f"{self.answer}[{self.span[0]}:{self.span[1]}]"


def read_labels(labels: Any, where: str) -> dict[str, float]:
    """Persona -> number from 0 to 1; personas without a mark (None or NaN, as columns of a table leave them) are left
    out. DataError for a number beyond."""
    found = _numbers(labels, "labels", where)
    for persona, mark in found.items():
        if mark < 0 or mark > 1:
            raise DataError(
                f"{where}: the label of {persona!r} is {mark:g}, a label lies between 0 (without) and 1 (with)"
            )
    return {persona: mark for persona, mark in found.items() if not math.isnan(mark)}


def read_weights(weights: Any, labels: Mapping[str, float], where: str) -> dict[str, float]:
    """Confidence in each label: a mapping, or one number for all. DataError unless it lies between 0 and 1."""
    if isinstance(weights, int | float) and not isinstance(weights, bool):
        weights = dict.fromkeys(labels, weights)
    found = _numbers(weights, "weights", where)
    if unknown := sorted(set(found) - set(labels)):
        raise DataError(f"{where}: weights name {', '.join(unknown)}, which the row does not label")
    if bad := {name: weight for name, weight in found.items() if not 0 <= weight <= 1}:
        raise DataError(f"{where}: a weight is a confidence between 0 and 1, got {next(iter(bad.values()))}")
    return found


def read_covariates(covariates: Any, where: str) -> dict[str, float]:
    """Name -> number; those without a value are left out."""
    found = _numbers(covariates, "covariates", where)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def read_flag(value: Any, name: str, where: str) -> bool:
    """true or false, 1 or 0. DataError for anything else."""
    if value not in (0, 1):
        raise DataError(f"{where}: {name} is true or false, got {value!r}")
    return bool(value)


def read_spans(spans: Any, text: str, where: str) -> tuple[Span, ...]:
    """Labelled spans of ``text``, by their first character. DataError for one that is not inside it, or two alike."""
    if not isinstance(spans, Sequence) or isinstance(spans, str):
        raise DataError(f"{where}: spans is a list of start, stop and labels, got {type(spans).__name__}")
    found = sorted((_span(span, text, where) for span in spans), key=lambda span: (span.start, span.stop))
    for one, other in pairwise(found):
        if (one.start, one.stop) == (other.start, other.stop):
            raise DataError(f"{where}: span {one.start} to {one.stop} stands twice: put its labels into one")
    return tuple(found)


def _span(span: Any, text: str, where: str) -> Span:
    span = {k: v for k, v in span.items() if v is not None} if isinstance(span, Mapping) else {}
    start, stop = span.get("start"), span.get("stop")
    if not all(isinstance(at, int) and not isinstance(at, bool) for at in (start, stop)) or "labels" not in span:
        raise DataError(f'{where}: a span reads {{"start": 0, "stop": 5, "labels": {{...}}}}, got {str(span)[:60]!r}')
    if not 0 <= start < stop <= len(text):
        raise DataError(f"{where}: span {start} to {stop} is not inside the text, which has {len(text)} characters")
    labels = read_labels(span["labels"], where)
    if not labels:
        raise DataError(f"{where}: span {start} to {stop} has no labels: name a persona, or leave the span out")
    return Span(start, stop, **read_marks({**span, "labels": labels}, where))


def read_marks(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``labels``, ``weights`` and ``hard`` of a row, a message or a span, those that it has."""
    found: dict[str, Any] = {}
    if "labels" in part:
        found["labels"] = read_labels(part["labels"], where)
    if "weights" in part:
        found["weights"] = read_weights(part["weights"], found.get("labels", {}), where)
    if "hard" in part:
        found["hard"] = read_flag(part["hard"], "hard", where)
    return found


def read_message(message: Any, where: str) -> dict[str, Any]:
    """A message with its marks and spans read. DataError unless role and content are text."""
    if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
        raise DataError(f"{where}: a message needs a role and a content, both text, got {str(message)[:60]!r}")
    message = {key: value for key, value in message.items() if value is not None}
    found = {**message, **read_marks(message, where)}
    if "spans" in message:
        found["spans"] = read_spans(message["spans"], message["content"], where)
    marked = [key for key in ("labels", "spans") if found.get(key)]
    if marked and message["role"] != "assistant":
        raise DataError(f"{where}: {marked[0]} belong to answers, here they stand in a message of {message['role']!r}")
    return found


def read_messages(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The messages of a row."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"{where}: messages is a list of role and content, got {type(messages).__name__}")
    return tuple(read_message(message, where) for message in messages)


def _numbers(values: Any, what: str, where: str) -> dict[str, float]:
    """Name -> number without those that are None. DataError for anything else than finite numbers and NaN."""
    shape = f'{where}: {what} read {{"NAME": NUMBER, ...}}, got {str(values)[:60]!r}'
    if not isinstance(values, Mapping) or not all(isinstance(v, int | float | None) for v in values.values()):
        raise DataError(shape)
    try:
        found = {str(name): float(value) for name, value in values.items() if value is not None}
    except OverflowError as error:
        raise DataError(shape) from error
    if any(math.isinf(value) for value in found.values()):
        raise DataError(shape)
    return found
