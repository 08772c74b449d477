"""Texts to sequences of tokens that fit the model, from any place in them."""

from collections.abc import Iterator
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_persona.activations.dialogues import Dialogue, Tokens, encode, tokenize
from sae_persona.activations.lm import LM
from sae_persona.activations.texts import Texts

Which = Literal["all", "answers"]
AT_ONCE = 64  # texts that are tokenised in one call, which fast tokenizers spread over the cores


class Place(NamedTuple):
    """Where a sequence stands: in which round over the texts, in which text, which of its pieces. All from 0."""

    round: int = 0
    text: int = 0
    piece: int = 0


def sequences(lm: LM, texts: Texts, context_size: int, which: Which = "all") -> Iterator[Tokens]:
    """Sequences of at most ``context_size`` tokens that have something to keep.

    "all": every text whole, in pieces that each begin with BOS if the text did. "answers": each text up to the limit.
    """
    for _, tokens in placed(lm, texts, context_size, which, Place()):
        yield tokens


def placed(lm: LM, texts: Texts, context_size: int, which: Which, start: Place) -> Iterator[tuple[Place, Tokens]]:
    """The sequences of one round from ``start`` on, each with its place."""
    numbered = enumerate(islice(iter(texts), start.text, None), start=start.text)
    while block := list(islice(numbered, AT_ONCE)):
        for number, pieces in _cut(lm, block, context_size, which):
            for i, tokens in enumerate(pieces):
                place = Place(start.round, number, i)
                if place >= start and _has_some(lm, tokens, which):
                    yield place, tokens


def kept(lm: LM, tokens: Tokens, which: Which = "all") -> Tensor:
    """Which tokens of a sequence are wanted: bool [t]. Never BOS, whose activations are like no others."""
    wanted = torch.full((len(tokens.ids),), which == "all")
    for answer in tokens.answers if which == "answers" else ():
        wanted[answer.start : answer.stop] = True
        wanted[answer.pre] = True
    return wanted if lm.bos_id is None else wanted & (id_tensor(tokens) != lm.bos_id)


def id_tensor(tokens: Tokens) -> Tensor:
    """The ids of a sequence: [t] int64. By way of numpy, which reads a list five times as fast as torch."""
    return torch.from_numpy(np.asarray(tokens.ids, dtype=np.int64))


def _has_some(lm: LM, tokens: Tokens, which: Which) -> bool:
    """Whether `kept` would keep a token; most sequences say so at once."""
    if which == "all":
        return any(i != lm.bos_id for i in tokens.ids)
    return bool(kept(lm, tokens, which).any())


def _cut(
    lm: LM, block: list[tuple[int, str | Dialogue]], size: int, which: Which
) -> Iterator[tuple[int, list[Tokens]]]:
    """The pieces of each text."""
    if which == "answers":
        for number, text in block:
            yield number, [tokenize(lm, text, context_size=size)]
        return
    plain = {number: text for number, text in block if isinstance(text, str)}
    ids = dict(zip(plain, encode(lm, list(plain.values())), strict=True))
    for number, text in block:
        yield number, _pieces(lm, ids[number] if number in ids else tokenize(lm, text).ids, size)


def _pieces(lm: LM, ids: list[int], size: int) -> list[Tokens]:
    bos = [i for i in ids[:1] if i == lm.bos_id]
    room = size - len(bos)
    return [Tokens(bos + ids[at : at + room], first=at - len(bos)) for at in range(len(bos), len(ids), room)]
