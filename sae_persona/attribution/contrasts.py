"""Contrast pairs: one prompt, an answer that shows a persona and one that does not.

Rows of JSONL or parquet:

    {"messages": [..., {"role": "user", "content": "..."}], "answers": {"with": "...", "without": "..."}}

perhaps with ``id``, ``template``, ``domain``, ``split`` (train or held_out) and ``speaker``, who answers, for chat
templates that can say so. A row of a model without a chat template has ``prompt``, a text, in place of ``messages``.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from sae_persona.activations.dialogues import Dialogue
from sae_persona.activations.texts import READERS, Texts, read_texts
from sae_persona.errors import DataError

MIN_PAIRS = 5
"""Fewest pairs of each split: an interval over fewer means little."""
_ABOUT = ("template", "domain", "split", "id")


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One prompt with two answers to it."""

    persona_answer: str
    other_answer: str
    messages: tuple[dict[str, Any], ...] = ()
    """The chat up to the question; empty where there is a ``prompt``."""
    prompt: str = ""
    """A plain text that the answers go on from."""
    speaker: str | None = None
    id: str = ""
    template: str = ""
    domain: str = ""
    split: str = ""
    """"train", "held_out" or "" for not said."""

    @property
    def question(self) -> str:
        """What is answered, without what came before it: pairs that share it are not independent."""
        return self.messages[-1]["content"] if self.messages else self.prompt

    @classmethod
    def from_row(cls, row: Any, where: str) -> Self:
        """Check one row. DataError, which begins with ``where`` the row stands, says what is wrong."""
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: a row of named fields is wanted, got {type(row).__name__}")
        answers = row.get("answers")
        if not isinstance(answers, Mapping):
            raise DataError(f'{where}: a pair needs answers {{"with": "...", "without": "..."}}, got {answers!r}')
        given = {name: answers.get(name) for name in ("with", "without")}
        for name, answer in given.items():
            if not isinstance(answer, str) or not answer.strip():
                raise DataError(f"{where}: the answer {name!r} the persona is missing or blank: give a text")
        if given["with"] == given["without"]:
            raise DataError(f"{where}: the answers with and without the persona are the same: there is no contrast")
        asked = "messages" if row.get("messages") else "prompt"
        if not row.get(asked):
            raise DataError(f"{where}: a pair needs messages, or a prompt, got {', '.join(row)}")
        about = {name: row[name] for name in _ABOUT if name in row}
        dialogue = Dialogue.from_row({"messages" if asked == "messages" else "text": row[asked], **about}, where)
        if dialogue.messages and dialogue.messages[-1]["role"] == "assistant":
            raise DataError(f"{where}: the messages end with an answer: leave it out, and give both under answers")
        return cls(
            persona_answer=answers["with"],
            other_answer=answers["without"],
            messages=dialogue.messages,
            prompt=dialogue.text or "",
            speaker=row.get("speaker"),
            **{name: getattr(dialogue, name) for name in _ABOUT},
        )


def read_contrasts(source: str | Path | Iterable[Any]) -> list[Contrast]:
    """Pairs from a .jsonl or .parquet file, or from rows. DataError, with the row, for what is not right."""
    pairs = [row if isinstance(row, Contrast) else Contrast.from_row(row, where) for where, row in _rows(source)]
    if not pairs:
        raise DataError(f"{source if isinstance(source, str | Path) else 'the list of pairs'} is empty")
    return pairs


def _rows(source: str | Path | Iterable[Any]) -> Iterator[tuple[str, Any]]:
    if not isinstance(source, str | Path):
        return ((f"pair {i}", row) for i, row in enumerate(source))
    path, known = Path(source).expanduser(), (".jsonl", ".parquet")
    if not path.is_file():
        raise DataError(f"no pairs at {path}: there is no such file")
    if path.suffix not in known:
        raise DataError(f"cannot tell what {path} is: pairs come as {' or '.join(known)}")
    return READERS[path.suffix](path)


def contrasts_of(texts: str | Path | Iterable[Any] | Texts, persona: str) -> list[Contrast]:
    """Pairs out of labelled dialogues: two answers to one question, one labelled with the persona and one without.

    They agree in template, domain, split and the question itself. What came before it may differ: the prompt is one
    dialogue's, in turns that with the persona and that without. DataError if no question was answered both ways.
    """
    found: dict[tuple[str, ...], tuple[list[Dialogue], list[Dialogue]]] = defaultdict(lambda: ([], []))
    for text in read_texts(texts):
        if isinstance(text, Dialogue) and len(text.messages) > 1 and text.messages[-1]["role"] == "assistant":
            label = (text.messages[-1].get("labels") or text.labels or {}).get(persona)
            if label is not None:
                key = (text.template, text.domain, text.split, text.messages[-2]["content"])
                found[key][label < 0.5].append(text)
    pairs = [
        _pair(shows, other, within=(shows, other)[number % 2])
        for _, both in sorted(found.items())
        for number, (shows, other) in enumerate(zip(*both, strict=False))
        if shows.messages[-1]["content"].strip() != other.messages[-1]["content"].strip()
    ]
    if not pairs:
        raise DataError(
            f"no question has an answer with {persona!r} and one without it in these dialogues: "
            "give contrast pairs as a file"
        )
    return pairs


def _pair(shows: Dialogue, other: Dialogue, within: Dialogue) -> Contrast:
    return Contrast(
        persona_answer=shows.messages[-1]["content"],
        other_answer=other.messages[-1]["content"],
        messages=within.messages[:-1],
        speaker=within.messages[-1].get("name"),
        id=f"{shows.id}|{other.id}",
        template=within.template,
        domain=within.domain,
        split=within.split,
    )


def split_pairs(pairs: Sequence[Contrast]) -> tuple[list[Contrast], list[Contrast]]:
    """The train and the held-out pairs; where a pair does not say, half of the questions each, by their hash.

    DataError if one has fewer than MIN_PAIRS.
    """
    parts: dict[str, list[Contrast]] = {"train": [], "held_out": []}
    for pair in pairs:
        drawn = "held_out" if sha256(pair.question.encode()).digest()[0] % 2 else "train"
        parts[pair.split or drawn].append(pair)
    for name, part in parts.items():
        if len(part) < MIN_PAIRS:
            raise DataError(
                f"{len(part)} contrast pairs are in the {name} split, at least {MIN_PAIRS} are needed: "
                "give more pairs, of more questions"
            )
    return parts["train"], parts["held_out"]
