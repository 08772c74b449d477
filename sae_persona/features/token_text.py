"""Tokens as text that people and language models read."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any


def token_text(tokenizer: Any, token: int) -> str:
    """One token alone, its leading space kept: what decoding gives, or its symbol if it is no text by itself."""
    return _token_text(tokenizer, int(token))


@cache
def _token_text(tokenizer: Any, token: int) -> str:
    text, symbol = tokenizer.decode([token]), str(tokenizer.convert_ids_to_tokens(token))
    if not text or "\ufffd" in text:  # part of a character
        return symbol
    return f" {text}" if symbol.startswith("▁") and not text.startswith(" ") else text


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it; together they are the text, but for broken characters."""
    shown = [tokenizer.decode(list(tokens[:n])) for n in range(len(tokens) + 1)]
    return [after[_same(before, after) :] for before, after in pairwise(shown)]


def _same(a: str, b: str) -> int:
    """How many characters they have in common at the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def marked(parts: Sequence[str], notes: Sequence[str | None]) -> str:
    """The text with a note at some tokens: ``the [[cat|9]] sat``. A token without a note stands as it is.

    parts   as `pieces` gives them; line breaks are shown as ``\\n``, so that a text is one line
    """
    return "".join(_with_note(part, note) for part, note in zip(parts, notes, strict=True)).strip()


def _with_note(part: str, note: str | None) -> str:
    part = part.replace("\r", "").replace("\n", "\\n")
    if note is None:
        return part
    word = part.lstrip(" ")
    return f"{part[: len(part) - len(word)]}[[{word}{note}]]"
