"""Read the sampled dialogues: parse them, keep near-duplicates in one part, mark the answer that the label is about."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from words import PATTERNS, is_neutral

NGRAM = 10
"""Dialogues that share so many words in a row, or their first question, are near-duplicates."""
SHARES = {"train": 0.6, "held_out": 0.8, "development": 0.88, "test": 1.0}
"""Upper ends of the parts, in the hash of a group of near-duplicates."""

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Dialogues by part, none of whose groups is in two parts."""

    texts: dict[str, list[str]]
    labels: dict[str, str]
    """Text -> label, of those that have one."""
    n_groups: int


def read_corpus(folder: Path) -> Corpus:
    """Read ``dialogs.txt`` and ``labelled.jsonl``."""
    texts = [line.strip() for line in (folder / "dialogs.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [json.loads(line) for line in (folder / "labelled.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = {row["text"].strip(): row["label"] for row in rows}
    texts = sorted(set(texts) | set(labels))
    groups = near_duplicates(texts)
    parts: dict[str, list[str]] = {name: [] for name in SHARES}
    for text, group in zip(texts, groups, strict=True):
        parts[part_of(texts[group])].append(text)
    return Corpus(texts=parts, labels=labels, n_groups=len(set(groups)))


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """For each text the number of the first text of its group: union over shared n-grams and first questions."""
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        for key in _keys(text):
            a, b = root(i), root(first.setdefault(key, i))
            parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(texts))]


def _keys(text: str) -> list[str]:
    words = re.findall(r"[a-z']+", re.sub(r"\[/?inst\]", " ", text))
    question = " ".join(re.findall(r"[a-z']+", text.partition("[/inst]")[0]))
    return [question, *(" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))]


def part_of(text: str) -> str:
    """Part of the group whose first text this is, by hash."""
    at = int.from_bytes(sha256(text.encode()).digest()[:8], "big") / 2**64
    return next(name for name, end in SHARES.items() if at < end)


def messages(text: str) -> list[Message]:
    """The turns of a dialogue, up to where two of one role meet; empty if it begins with an answer."""
    found: list[Message] = []
    pieces = re.split(r"(\[/?inst\])", text)[1:]
    for mark, content in zip(pieces[::2], pieces[1::2], strict=True):
        role = "user" if mark == "[inst]" else "assistant"
        if role != ("assistant" if len(found) % 2 else "user") or not content.strip():
            break
        found.append({"role": role, "content": content.strip()})
    return found


def unlabelled_rows(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Dialogues to train on and to measure an SAE's quality on; those without an answer are left out."""
    chats = [messages(text) for text in texts]
    return [{"messages": chat[: len(chat) // 2 * 2]} for chat in chats if len(chat) > 1]


def labelled_rows(corpus: Corpus, personas: Sequence[str]) -> list[dict[str, Any]]:
    """One labelled answer a dialogue: the first that holds a word of the dialogue's label; what follows is cut off.

    The label is a property of the whole dialogue, and its words may stand in the user's turns alone; such dialogues
    are left out. ``template`` is the number of the answer, ``domain`` whether the text before it had such a word
    already: permuted within both, labels cannot be told by the position or by "a word of some class was said".
    """
    rows = []
    for part, texts in corpus.texts.items():
        split = "train" if part == "train" else "held_out"
        for text in filter(corpus.labels.get, texts):
            if row := _labelled(text, corpus.labels[text], personas):
                rows.append({**row, "split": split})
    return rows


def _labelled(text: str, label: str, personas: Sequence[str]) -> dict[str, Any] | None:
    chat, pattern = messages(text), PATTERNS[label]
    for i in range(1, len(chat), 2):
        if pattern.search(chat[i]["content"]):
            said = any(pattern.search(message["content"]) for message in chat[:i])
            return {
                "messages": chat[: i + 1],
                "labels": {persona: float(label == persona) for persona in personas},
                "template": f"answer {i // 2 + 1}",
                "domain": "said" if said else "unsaid",
                "author": label,
                "id": sha256(text.encode()).hexdigest()[:12],
            }
    return None


def questions(texts: Sequence[str], n: int) -> list[list[Message]]:
    """First questions, each once, that hold no word of any list; ``n`` of them in the order of their hash."""
    first = {chat[0]["content"] for chat in map(messages, texts) if chat}
    neutral = sorted(filter(is_neutral, first), key=lambda text: sha256(text.encode()).digest())
    return [[{"role": "user", "content": text}] for text in neutral[:n]]
