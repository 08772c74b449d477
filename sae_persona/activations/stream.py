"""Texts to shuffled batches of activations, without BOS and padding, from any place in them.

texts ─► sequences ─► groups ─► rows of activations ─► shuffle ─► batches
         a thread, ahead        the model              a buffer
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from sae_persona.activations.ahead import ahead
from sae_persona.activations.dialogues import Tokens
from sae_persona.activations.groups import Forward, Group, Layout, groups
from sae_persona.activations.harvest import is_finite, not_finite, read_group
from sae_persona.activations.hooks import check_packing, read
from sae_persona.activations.lm import LM, padded
from sae_persona.activations.sequences import Place, Which, kept, sequences
from sae_persona.activations.shuffle import Chunk, Shuffle, Sizes
from sae_persona.activations.texts import Texts, read_texts
from sae_persona.errors import ConfigError, DataError
from sae_persona.types import HookPoint, State

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    context_size: int = 128
    """Tokens a sequence, BOS included. Longer texts are cut into several, longer dialogues are cut off."""
    batch_tokens: int = 1024
    """Activations a batch."""
    buffer_tokens: int = 65_536
    """Activations held for shuffling."""
    buffer_on_host: bool = False
    """Hold them in the host's memory, pinned, where the model is on a GPU."""
    lm_batch: int = 32
    """Rows of sequences a forward pass."""
    pack: bool | None = None
    """Put several short sequences in one row, where each sees only itself. None: where the model is on a GPU, which
    short rows leave idle."""
    ahead: int = 2
    """Groups of eight forward passes that a thread tokenises ahead of the model. 0: no thread."""
    tokens: Which = "all"
    """Which tokens come out: all, or those of answers in dialogues with the pre-answer token."""
    passes: int = 1
    """Times over the texts."""
    hold_tokens: int = 0
    """Activations kept in memory: if the texts have no more, later passes take them from there, not from the model."""
    seed: int = 0
    """Seed of the shuffling."""

    def __post_init__(self) -> None:
        for name, least in (("context_size", 2), ("batch_tokens", 1), ("lm_batch", 1), ("passes", 1), ("ahead", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.buffer_tokens < self.batch_tokens:
            raise ConfigError(f"buffer_tokens must hold a batch of {self.batch_tokens}, got {self.buffer_tokens}")
        if self.tokens not in get_args(Which):
            raise ConfigError(f"tokens is one of {', '.join(get_args(Which))}, got {self.tokens!r}")


class Source(Protocol):
    """Where rows of activations come from: the model, or a store of what it gave before."""

    hooks: tuple[HookPoint, ...]
    d_in: int
    device: torch.device

    def chunks(self, start: Place) -> Iterator[Chunk]:
        """The rows of one round from a place on."""
        ...

    def n_rows(self) -> int:
        """Rows of one round."""
        ...


class Stream:
    """Batches {hook point: [batch_tokens, d_in]} in the dtype of the model. Restartable: same seed, same batches."""

    def __init__(self, source: Source, config: StreamConfig) -> None:
        self.source, self.config = source, config

    @property
    def hooks(self) -> tuple[HookPoint, ...]:
        return self.source.hooks

    @property
    def d_in(self) -> int:
        return self.source.d_in

    def __iter__(self) -> Shuffle:
        config = self.config
        sizes = Sizes(buffer_tokens=config.buffer_tokens, batch_tokens=config.batch_tokens)
        return Shuffle(self._chunks, sizes, seed=config.seed, device=self.source.device, host=config.buffer_on_host)

    def resume(self, state: State) -> Shuffle:
        """An iterator that goes on where another was when it gave this `snapshot`."""
        return iter(self).restore(state)

    def join(self, states: Sequence[State], rank: int, world: int) -> Shuffle:
        """An iterator of one of ``world`` ranks that goes on near where others, of another number, were.

        Each had every so manieth text. It begins with the earliest text that one of them was at; buffers are lost.
        """
        places = [Place(*state.numbers["place"]) for state in states]
        earliest = min((place.round, place.text * len(states) + r) for r, place in enumerate(places))
        first = max(0, -(-(earliest[1] - rank) // world))
        return iter(self).begin(Place(earliest[0], first))

    def at(self, hook: HookPoint) -> "OneHook":
        """The batches of one hook point, as tensors."""
        return OneHook(self, str(hook))

    def n_batches(self) -> int:
        """How many batches come out; of texts, by tokenising them all: minutes on a large corpus."""
        return max(1, self.config.passes * self.source.n_rows() // self.config.batch_tokens)

    def _chunks(self, start: Place) -> Iterator[Chunk]:
        """All rounds, as far as they are left."""
        held = _Held(self.config.hold_tokens)
        while start.round < self.config.passes:
            after = Place(start.round + 1)
            if held.whole:
                yield from held.again(start.round)
            else:
                held.begin(whole_round=start == Place(start.round))
                for chunk in self.source.chunks(start):
                    held.keep(chunk)
                    yield chunk
                held.end()
            start = after


class OneHook:
    """The batches [batch_tokens, d_in] of one hook point of a stream."""

    def __init__(self, stream: Stream, key: str) -> None:
        self.stream, self.key = stream, key

    @property
    def d_in(self) -> int:
        return self.stream.d_in

    def __iter__(self) -> "_One":
        return _One(iter(self.stream), self.key)

    def resume(self, state: State) -> "_One":
        return _One(self.stream.resume(state), self.key)

    def join(self, states: Sequence[State], rank: int, world: int) -> "_One":
        return _One(self.stream.join(states, rank, world), self.key)

    def n_batches(self) -> int:
        return self.stream.n_batches()


class _One:
    def __init__(self, batches: Shuffle, key: str) -> None:
        self.batches, self.key = batches, key

    def __iter__(self) -> "_One":
        return self

    def __next__(self) -> Tensor:
        return next(self.batches)[self.key]

    def snapshot(self) -> State:
        return self.batches.snapshot()


class _Held:
    """The chunks of one whole round, as long as they fit."""

    def __init__(self, room: int) -> None:
        self.room, self.n, self.whole = room, 0, False
        self.chunks: list[Chunk] = []
        self._complete = False

    def begin(self, *, whole_round: bool) -> None:
        self.n, self._complete = 0, whole_round
        self.chunks.clear()

    def keep(self, chunk: Chunk) -> None:
        self.n += len(next(iter(chunk.rows.values())))
        if self.n <= self.room:
            self.chunks.append(chunk)
        else:
            self.chunks.clear()

    def end(self) -> None:
        self.whole = self._complete and self.n <= self.room

    def again(self, number: int) -> Iterator[Chunk]:
        for start, end, rows in self.chunks:
            yield Chunk(start._replace(round=number), end._replace(round=number), rows)


class FromModel:
    """Activations at hook points, as the model gives them on texts."""

    def __init__(self, lm: LM, hooks: Sequence[HookPoint], texts: Texts, layout: Layout, n_ahead: int) -> None:
        self.lm, self.hooks, self.texts, self.layout, self.n_ahead = lm, tuple(hooks), texts, layout, n_ahead
        self.d_in, self.device = lm.d_model, lm.device

    def n_rows(self) -> int:
        lm, layout = self.lm, self.layout
        cut = sequences(lm, self.texts, layout.context_size, layout.which)
        return sum(int(kept(lm, tokens, layout.which).sum()) for tokens in cut)

    def chunks(self, start: Place) -> Iterator[Chunk]:
        for group, _, rows in self.read(start, _nothing):
            yield Chunk(group.start, group.end, {str(hook): x for hook, x in rows.items()})

    def read(self, start: Place, about: Callable[[Group], T]) -> Iterator[tuple[Group, T, dict[HookPoint, Tensor]]]:
        """Each group of one round from a place on, what ``about`` says of it, and its rows at each hook point.

        about   called in the thread that is ahead of the model
        """
        lm, cuda = self.lm, self.lm.device.type == "cuda"
        made = groups(lm, self.texts, self.layout, start)
        source = ahead(((_pinned(group) if cuda else group, about(group)) for group in made), self.n_ahead)
        waiting: tuple[Group, dict[HookPoint, Tensor]] | None = None
        found = False
        for group, said in source:
            rows = read_group(lm, self.hooks, group)
            finite = {hook: is_finite(x) for hook, x in rows.items()}
            if not cuda:
                self.check(group, finite)
            elif waiting is not None:  # a group late, so that the host need not wait for the GPU
                self.check(*waiting)
            waiting, found = (group, finite), True
            yield group, said, rows
        if cuda and waiting is not None:
            self.check(*waiting)
        if not found and start == Place(start.round):
            wanted = "a token" if self.layout.which == "all" else "an answer: tokens=answers needs dialogues"
            raise DataError(f"none of the texts has {wanted}. Look at the texts, or at the tokenizer of {lm.name}.")

    def check(self, group: Group, finite: dict[HookPoint, Tensor]) -> None:
        """DataError, with the sequence's words, if a row of the group is not finite at a hook point: bool [n] each."""
        for hook in sorted(finite, key=lambda hook: hook.layer):  # the first is where it began
            if not finite[hook].all():
                raise not_finite(self.lm, hook, self._culprit(group, hook, finite[hook]))

    def _culprit(self, group: Group, hook: HookPoint, finite: Tensor) -> Tokens:
        """The first sequence whose activations are not finite even alone: a row that is packed spoils all in it."""
        rows = (~finite).nonzero().flatten().tolist()
        bad = dict.fromkeys(bisect_right(group.bounds, row) - 1 for row in rows)
        for i in bad:
            one = group.sequences[i]
            acts = read(self.lm, [hook], *padded(self.lm, [one.ids]))[hook]
            if not acts.isfinite().all():
                return one
        return group.sequences[next(iter(bad))]


def _pinned(group: Group) -> Group:
    forwards: list[Forward] = [forward.pinned() for forward in group.forwards]
    return replace(group, forwards=forwards)


def _nothing(group: Group) -> None:
    """All that a plain stream wants to know of a group."""


def streams(
    lm: LM,
    hooks: Sequence[HookPoint],
    texts: str | Path | Iterable[Any] | Texts,
    config: StreamConfig | None = None,
) -> Stream:
    """Stream activations at several hook points from one pass of the model; ``texts`` is what ``read_texts`` takes.

    ModelError, ConfigError or DataError for what cannot be; iterating raises DataError for activations that are not
    finite and for texts without a single token.
    """
    config = config or StreamConfig()
    return Stream(from_model(lm, hooks, texts, config), config)


def from_model(
    lm: LM, hooks: Sequence[HookPoint], texts: str | Path | Iterable[Any] | Texts, config: StreamConfig
) -> FromModel:
    """The rows of a stream before they are shuffled. Errors as `streams`."""
    for hook in hooks:
        lm.check(hook)
    if lm.n_positions is not None and config.context_size > lm.n_positions:
        raise ConfigError(f"context_size {config.context_size} is more than {lm.name} takes: {lm.n_positions}")
    source = FromModel(lm, hooks, read_texts(texts), layout_for(lm, config), config.ahead)
    if source.layout.pack:
        check_packing(lm, max(hooks, key=lambda hook: hook.layer), config.context_size)
    return source


def stream(
    lm: LM, hook: HookPoint, texts: str | Path | Iterable[Any] | Texts, config: StreamConfig | None = None
) -> OneHook:
    """As `streams`, at one hook point: batches are tensors [batch_tokens, d_in]."""
    return streams(lm, [hook], texts, config).at(hook)


def layout_for(lm: LM, config: StreamConfig) -> Layout:
    """How sequences are put together on the device of the model."""
    pack = lm.device.type == "cuda" if config.pack is None else config.pack
    return Layout(context_size=config.context_size, lm_batch=config.lm_batch, which=config.tokens, pack=pack)
