"""Texts to shuffled batches of activations, without BOS and padding."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sae_persona.activations.dialogues import Tokens, tokenize
from sae_persona.activations.hooks import read
from sae_persona.activations.lm import LM, padded
from sae_persona.activations.shuffle import shuffled
from sae_persona.activations.texts import Texts, read_texts
from sae_persona.errors import ConfigError, DataError
from sae_persona.types import HookPoint

Which = Literal["all", "answers"]
SORTED_FORWARDS = 8  # as many forward passes are filled from one group sorted by length


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    context_size: int = 128
    """Tokens a sequence, BOS included. Longer texts are cut into several, longer dialogues are cut off."""
    batch_tokens: int = 1024
    """Activations a batch."""
    buffer_tokens: int = 65_536
    """Activations held for shuffling."""
    lm_batch: int = 32
    """Sequences a forward pass."""
    tokens: Which = "all"
    """Which tokens come out: all, or those of answers in dialogues with the pre-answer token."""
    passes: int = 1
    """Times over the texts."""
    hold_tokens: int = 0
    """Activations kept in memory: if the texts have no more, later passes take them from there, not from the model."""
    seed: int = 0
    """Seed of the shuffling."""

    def __post_init__(self) -> None:
        for name, least in (("context_size", 2), ("batch_tokens", 1), ("lm_batch", 1), ("passes", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.buffer_tokens < self.batch_tokens:
            raise ConfigError(f"buffer_tokens must hold a batch of {self.batch_tokens}, got {self.buffer_tokens}")
        if self.tokens not in get_args(Which):
            raise ConfigError(f"tokens is one of {', '.join(get_args(Which))}, got {self.tokens!r}")


class Stream:
    """Batches [batch_tokens, d_in] fp32 of activations at one hook point. Restartable: same seed, same batches."""

    def __init__(self, lm: LM, hook: HookPoint, texts: str | Path | Iterable[Any] | Texts, config: StreamConfig):
        lm.check(hook)
        if lm.n_positions is not None and config.context_size > lm.n_positions:
            raise ConfigError(f"context_size {config.context_size} is more than {lm.name} takes: {lm.n_positions}")
        self.lm = lm
        self.hook = hook
        self.texts = read_texts(texts)
        self.config = config

    @property
    def d_in(self) -> int:
        return self.lm.d_model

    def __iter__(self) -> Iterator[Tensor]:
        config = self.config
        return shuffled(
            self._chunks(), buffer_tokens=config.buffer_tokens, batch_tokens=config.batch_tokens, seed=config.seed
        )

    def n_batches(self) -> int:
        """How many batches come out, by tokenising all texts: minutes on a large corpus, and the model is not run."""
        config = self.config
        cut = sequences(self.lm, self.texts, config.context_size, config.tokens)
        n = sum(int(kept(self.lm, tokens, config.tokens).sum()) for tokens in cut)
        return max(1, config.passes * n // config.batch_tokens)

    def _chunks(self) -> Iterator[Tensor]:
        """The kept activations of each sequence, in order: [m, d_in]."""
        config, held = self.config, _Held(self.config.hold_tokens)
        for _ in range(config.passes):
            if held.whole:
                yield from held.chunks
                continue
            for chunk in self._harvested():
                held.keep(chunk)
                yield chunk
            held.whole = held.n <= config.hold_tokens
        if not held.n:
            wanted = "a token" if config.tokens == "all" else "an answer: tokens=answers needs dialogues"
            raise DataError(
                f"none of the texts has {wanted}. Look at the texts, or at the tokenizer of {self.lm.name}."
            )

    def _harvested(self) -> Iterator[Tensor]:
        """One pass of the texts through the model."""
        config = self.config
        cut = sequences(self.lm, self.texts, config.context_size, config.tokens)
        for tokens, acts in harvest(self.lm, self.hook, cut, config.lm_batch):
            yield acts[kept(self.lm, tokens, config.tokens).to(acts.device)]


class _Held:
    """Chunks of the first pass, as long as they fit; ``n`` counts the activations of all, kept or not."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.n = 0
        self.whole = False
        self.chunks: list[Tensor] = []

    def keep(self, chunk: Tensor) -> None:
        self.n += len(chunk)
        if self.n <= self.room:
            self.chunks.append(chunk)
        else:
            self.chunks.clear()


def stream(
    lm: LM, hook: HookPoint, texts: str | Path | Iterable[Any] | Texts, config: StreamConfig | None = None
) -> Stream:
    """Stream activations at ``hook``; ``texts`` is whatever ``read_texts`` takes.

    ModelError, ConfigError or DataError for what cannot be; iterating raises DataError for activations that are not
    finite and for texts without a single token.
    """
    return Stream(lm, hook, texts, config or StreamConfig())


def sequences(lm: LM, texts: Texts, context_size: int, which: Which = "all") -> Iterator[Tokens]:
    """Sequences of at most ``context_size`` tokens that have something to keep.

    "all": every text whole, in pieces that each begin with BOS if the text did. "answers": each text up to the limit.
    """
    for text in texts:
        if which == "answers":
            pieces = [tokenize(lm, text, context_size=context_size)]
        else:
            pieces = _pieces(lm, tokenize(lm, text).ids, context_size)
        yield from (piece for piece in pieces if kept(lm, piece, which).any())


def kept(lm: LM, tokens: Tokens, which: Which = "all") -> Tensor:
    """Which tokens of a sequence are wanted: bool [t]. Never BOS, whose activations are like no others."""
    wanted = torch.full((len(tokens.ids),), which == "all")
    for answer in tokens.answers if which == "answers" else ():
        wanted[answer.start : answer.stop] = True
        wanted[answer.pre] = True
    return wanted if lm.bos_id is None else wanted & (torch.tensor(tokens.ids) != lm.bos_id)


def harvest(lm: LM, hook: HookPoint, tokens: Iterable[Tokens], lm_batch: int) -> Iterator[tuple[Tokens, Tensor]]:
    """Each sequence with its activations [t, d_model] fp32, BOS included, in the order given.

    Sequences of like length share a forward pass of ``lm_batch``. DataError where an activation is not finite.
    """
    source = iter(tokens)
    while group := list(islice(source, SORTED_FORWARDS * lm_batch)):
        by_length = sorted(range(len(group)), key=lambda i: len(group[i].ids))
        found: dict[int, Tensor] = {}
        for at in range(0, len(group), lm_batch):
            rows = by_length[at : at + lm_batch]
            found.update(zip(rows, _activations(lm, hook, [group[i].ids for i in rows]), strict=True))
        for i, one in enumerate(group):
            yield one, found.pop(i)


def _activations(lm: LM, hook: HookPoint, batch: Sequence[list[int]]) -> list[Tensor]:
    # on the right, where causal attention cannot see padding whatever the model does with positions
    input_ids, mask = padded(lm, batch, side="right")
    acts = read(lm, [hook], input_ids, mask)[hook].float()
    broken = (~acts.isfinite().all(dim=-1) & mask.bool()).any(dim=-1)
    if broken.any():
        start = lm.tokenizer.decode(batch[int(broken.int().argmax())][:12])
        raise DataError(f"activations at {hook} of {lm.name} are not finite in {start!r}: load it with dtype float32")
    return [acts[row, : len(ids)] for row, ids in enumerate(batch)]


def _pieces(lm: LM, ids: list[int], size: int) -> list[Tokens]:
    bos = [i for i in ids[:1] if i == lm.bos_id]
    room = size - len(bos)
    return [Tokens(bos + ids[at : at + room]) for at in range(len(bos), len(ids), room)]
