"""Contexts as text: what was read, and where in it the latent fires hardest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sae_persona.features.contexts import WINDOW, TopContexts

AT_ONCE = 4096
"""Texts that are decoded in one call, which fast tokenizers spread over the cores."""
REPLACED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class ContextText:
    """A context as text; characters ``start`` to ``stop`` are the token on which the latent is strongest."""

    text: str
    start: int
    stop: int
    strength: float
    """The latent's activation there."""

    @property
    def token(self) -> str:
        return self.text[self.start : self.stop]

    def marked(self, around: int) -> str:
        """On one line: that token in brackets, and at most ``around`` characters on each side of it."""
        before, after = self.text[: self.start], self.text[self.stop :]
        before = f"…{before[-around:]}" if len(before) > around else before
        after = f"{after[:around]}…" if len(after) > around else after
        return f"{before}[{self.token}]{after}".replace("\n", "⏎")


def readable(contexts: TopContexts, tokenizer: Any) -> Iterator[list[ContextText]]:
    """The contexts of each latent, strongest first: a list for every latent, empty for one that has none.

    A character of several tokens is all the strongest one's if any of them is.
    """
    documents, all_tokens, acts = (x.cpu().numpy() for x in (contexts.document, contexts.tokens, contexts.acts))
    n, per = documents.shape
    for first in range(0, n, max(1, AT_ONCE // max(per, 1))):
        here = slice(first, min(n, first + max(1, AT_ONCE // max(per, 1))))
        latent, slot = np.nonzero(documents[here] >= 0)
        tokens, strength = all_tokens[here][latent, slot], acts[here][latent, slot, WINDOW]
        texts = _texts(tokens, strength.tolist(), tokenizer)
        ends = np.searchsorted(latent, np.arange(here.stop - here.start + 1))
        yield from (texts[start:stop] for start, stop in pairwise(ends))


def _texts(tokens: np.ndarray, strength: Sequence[float], tokenizer: Any) -> list[ContextText]:
    """tokens [m, 2 * WINDOW + 1], -1 beyond the document's ends; the strongest in the middle."""
    shown = tokens >= 0
    whole = _decoded([row[here].tolist() for row, here in zip(tokens, shown, strict=True)], tokenizer)
    left, right = tokens.copy(), tokens.copy()
    left[:, WINDOW:], right[:, WINDOW + 1 :] = -1, -1
    before, upto = (_decoded([row[row >= 0].tolist() for row in part], tokenizer) for part in (left, right))
    return [_context(*parts) for parts in zip(whole, before, upto, strength, strict=True)]


def _decoded(ids: list[list[int]], tokenizer: Any) -> list[str]:
    if not ids:  # of which transformers makes one text
        return []
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _context(whole: str, before: str, upto: str, strength: float) -> ContextText:
    """``before`` and ``upto`` are what stands before the strongest token, and with it."""
    start = min(len(before.rstrip(REPLACED)), len(whole))
    unfinished = len(upto) - len(upto.rstrip(REPLACED)) and not whole.startswith(upto)
    stop = min(len(upto.rstrip(REPLACED)) + 1 if unfinished else len(upto), len(whole))
    while start < stop - 1 and whole[start].isspace():  # words begin with their space in most tokenizers
        start += 1
    return ContextText(whole, start, max(start, stop), strength)
