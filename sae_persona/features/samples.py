"""The texts that an explanation is written from, and the others that it is tested on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sae_persona.activations.hooks import read
from sae_persona.activations.lm import LM, padded
from sae_persona.features.contexts import Context
from sae_persona.features.token_text import marked, pieces
from sae_persona.sae.model import SAE
from sae_persona.types import HookPoint

MARKED = 1 / 3
"""A token is marked if the latent fires on it with this share of its strongest activation in the text, or more."""


@dataclass(frozen=True)
class Item:
    """A text that is judged by an explanation, and whether yes is the right answer."""

    text: str
    truth: bool


def split(contexts: Sequence[Context]) -> tuple[list[Context], list[Context]]:
    """Every other context to explain from, the rest to test on: both halves hold strong ones and weaker ones."""
    return list(contexts[::2]), list(contexts[1::2])


def with_activations(tokenizer: Any, context: Context, strongest: float) -> str:
    """The text with its marked tokens as ``[[token|N]]``, N their activation from 1 to 9, where 9 is ``strongest``."""
    notes = [
        f"|{max(1, min(9, round(9 * act / strongest)))}" if on else None
        for act, on in zip(context.acts, _marks(context), strict=True)
    ]
    return marked(pieces(tokenizer, context.tokens), notes)


def plain(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text without marks."""
    return marked(pieces(tokenizer, tokens), [None] * len(tokens))


def with_marks(tokenizer: Any, context: Context, rng: np.random.Generator, *, right: bool) -> str | None:
    """The text with ``[[token]]`` where the latent fires, or at as many of the tokens where it does not.

    None if wrong marks are wanted and it fires on every token.
    """
    marks = _marks(context)
    if not right:
        silent = np.flatnonzero(np.array(context.acts) <= 0)
        if not len(silent):
            return None
        chosen = rng.choice(silent, min(sum(marks), len(silent)), replace=False)
        marks = np.isin(np.arange(len(marks)), chosen).tolist()
    return marked(pieces(tokenizer, context.tokens), ["" if on else None for on in marks])


def _marks(context: Context) -> list[bool]:
    return [act > 0 and act >= MARKED * context.strength for act in context.acts]


class SilentTexts:
    """Contexts of other latents, of which it is known on which each latent fires: texts that must not activate it.

    Each is read again as it is shown, cut out of its document, by the model and the SAE.
    """

    def __init__(self, lm: LM, sae: SAE, hook: HookPoint, contexts: Sequence[Context], *, batch: int = 32) -> None:
        self.contexts = [context for context in contexts if context.tokens]
        self._firing: list[set[int]] = []  # of each text
        for at in range(0, len(self.contexts), batch):
            self._firing += _firing(lm, sae, hook, [c.tokens for c in self.contexts[at : at + batch]])

    def of(self, latent: int, contexts: Sequence[Context], rng: np.random.Generator) -> list[list[int]]:
        """For each of the latent's contexts, tokens of another document on which it is silent, as long where possible.

        A text is cut at the right to the context's length, which changes nothing of what the model saw before the cut.
        As many as there are: none if the latent fires on every text.
        """
        documents = {context.document for context in contexts}
        free = [
            i
            for i, context in enumerate(self.contexts)
            if context.document not in documents and latent not in self._firing[i]
        ]
        order, found = [free[i] for i in rng.permutation(len(free))], []
        for context in contexts[: len(order)]:
            n = len(context.tokens)
            pick = next((i for i in order if len(self.contexts[i].tokens) >= n), order[0])
            order.remove(pick)
            found.append(self.contexts[pick].tokens[:n])
        return found


@torch.no_grad()
def _firing(lm: LM, sae: SAE, hook: HookPoint, texts: Sequence[list[int]]) -> list[set[int]]:
    """Of each text, the latents that fire on it; BOS is put before, and not counted."""
    bos = [] if lm.bos_id is None else [lm.bos_id]
    starts = [len(bos) if tokens[:1] != bos else 0 for tokens in texts]
    shown = [(bos if start else []) + tokens for start, tokens in zip(starts, texts, strict=True)]
    input_ids, mask = padded(lm, shown, side="right")
    x = read(lm, [hook], input_ids, mask)[hook]
    found: list[set[int]] = []
    for row, (tokens, start) in enumerate(zip(texts, starts, strict=True)):
        latents = sae.encode(x[row, start : start + len(tokens)].to(sae.w_enc))
        found.append(set(latents.idx.flatten()[latents.acts.flatten() > 0].tolist()))
    return found
