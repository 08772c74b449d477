"""Rows for the commands: labelled first answers, dialogues to train on, contrast pairs, word lists.

Parsing and the lists of words that made the labels are those of the experiment on happy and sad.
"""

import json
import re
import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "2026-11-craftgpt-emotions"))

from dialogs import messages
from words import PATTERNS, is_neutral

CLASSES = tuple(PATTERNS)
"""Six emotions, and the topics food and weather."""
TOPICS = {
    "people": "family friend friends people someone everyone children mother father brother sister neighbor others",
    "outside": "park outside sky nature garden trees walk air forest water beach flowers birds",
    "home": "house home room kitchen bed clothes trash bathroom",
    "stories": "movie movies story stories book books music song songs game games news",
    "body": "sleep heart chest stomach mind body tired death sick",
    "work": "work school job class problems plans week",
}
"""Topic -> words of the first question; the first topic with one of its words counts, else it is "none"."""
_WORD = re.compile(r"[a-z']+")


def write_texts(data: Path, out: Path) -> None:
    """Write all files into ``out``."""
    out.mkdir(parents=True)
    lines = [line.strip() for line in (data / "dialogs.txt").read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in (data / "labelled.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = {row["text"].strip(): row["label"] for row in rows}
    chats = {text: messages(text) for text in sorted(set(lines) | set(labels))}
    free = [chat for text, chat in chats.items() if text not in labels and len(chat) > 1]
    _write(out / "corpus.jsonl", ({"messages": chat[: len(chat) // 2 * 2]} for chat in free))
    labelled = [_row(chats[text], label, text) for text, label in sorted(labels.items()) if len(chats[text]) > 1]
    _write(out / "labelled.jsonl", labelled)
    lexicon = {name: sorted(_said(labelled, pattern)) for name, pattern in PATTERNS.items()}
    (out / "words.json").write_text(json.dumps(lexicon, indent=1), encoding="utf-8")


def _row(chat: list[dict[str, str]], label: str, text: str) -> dict[str, Any]:
    """The first answer of a dialogue, with the dialogue's label.

    ``template`` is how the question opens, ``domain`` its topic; ``said_CLASS`` whether it has a word of that class.
    """
    words = _WORD.findall(chat[0]["content"])
    topics = (name for name, listed in TOPICS.items() if set(listed.split()) & set(words))
    return {
        "messages": chat[:2],
        "labels": {name: float(label == name) for name in CLASSES},
        "template": " ".join(words[:2]),
        "domain": next(topics, "none"),
        "covariates": {f"said_{name}": float(p.search(chat[0]["content"]) is not None) for name, p in PATTERNS.items()},
        "id": sha256(text.encode()).hexdigest()[:12],
    }


def _said(rows: Iterable[dict[str, Any]], pattern: re.Pattern[str]) -> set[str]:
    return {word for row in rows for word in _WORD.findall(row["messages"][1]["content"]) if pattern.fullmatch(word)}


def write_pairs(split: Path, persona: str, out: Path, n: int) -> None:
    """Contrast pairs, ``n`` of each split at most: an answer with the label beside one without, to one question.

    Two dialogues of one topic, neither of whose questions has a word of any list; the answer with the label has a word
    of its list, the other has none. The question is that of the one and of the other dialogue in turns, so that which
    answer fits it better cancels.
    """
    rows = [json.loads(line) for line in split.read_text(encoding="utf-8").splitlines()]
    rows = sorted((row for row in rows if is_neutral(row["messages"][0]["content"])), key=lambda row: row["id"])
    pattern, pairs = PATTERNS[persona], []
    for part in ("train", "held_out"):
        made = []
        for topic in (*TOPICS, "none"):
            here = [row for row in rows if row["split"] == part and row["domain"] == topic]
            shows = [row for row in here if row["labels"][persona] and pattern.search(row["messages"][1]["content"])]
            other = [r for r in here if not r["labels"][persona] and not pattern.search(r["messages"][1]["content"])]
            made += zip(shows, other, strict=False)
        for i, (shows, other) in enumerate(made[:n]):
            asked = (shows, other)[i % 2]
            answers = {"with": shows["messages"][1]["content"], "without": other["messages"][1]["content"]}
            about = {name: asked[name] for name in ("template", "domain", "split", "id")}
            pairs.append({"messages": asked["messages"][:1], "answers": answers, **about})
    _write(out, pairs)


def write_neutral(split: Path, out: Path) -> None:
    """The labelled rows whose question has no word of any list."""
    rows = [json.loads(line) for line in split.read_text(encoding="utf-8").splitlines()]
    _write(out, (row for row in rows if is_neutral(row["messages"][0]["content"])))


def _write(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
