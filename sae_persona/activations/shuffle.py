"""A shuffle buffer for activations, with a seed and a place that can be told and found again.

Our own, because neighbouring tokens of a text must not share a batch, and because the buffers of data loaders lose or
repeat rows when a stream is taken up again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from sae_persona.activations.sequences import Place
from sae_persona.errors import ConfigError
from sae_persona.types import State

Rows = dict[str, Tensor]


class Chunk(NamedTuple):
    """Rows of a stream, [m, d] each by name, and the places before and after them."""

    start: Place
    end: Place
    rows: Rows


@dataclass(frozen=True)
class Sizes:
    """buffer_tokens: rows held at a time; batch_tokens: rows a batch. ConfigError if they are impossible."""

    buffer_tokens: int
    batch_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch_tokens <= self.buffer_tokens:
            raise ConfigError(
                f"a buffer of {self.buffer_tokens} tokens cannot serve batches of {self.batch_tokens}: make it larger"
            )


class Shuffle:
    """An iterator that mixes the rows of a stream: fill a buffer, serve a random half of it in batches, fill it again.

    source   the chunks from a place on; how the rows are cut makes no difference
    host     keep the buffer in the host's memory, pinned, even if the rows are on a GPU

    Each batch has [batch_tokens, d] by name. Every row comes once, except that rows left at the end which do not fill
    a batch are dropped, unless they are all there is: then they are one short batch. The same seed and rows give the
    same batches.
    """

    def __init__(
        self, source: Callable[[Place], Iterator[Chunk]], sizes: Sizes, *, seed: int, host: bool = False
    ) -> None:
        self._source, self._sizes, self._host = source, sizes, host
        self._chunks = source(Place())
        self._generator = torch.Generator().manual_seed(seed)
        self._buffer: Rows = {}
        self._chunk = Chunk(Place(), Place(), {})
        self._taken = self._of = 0  # rows of the chunk in the buffer, rows of the chunk
        self._order: Tensor | None = None  # of the rows in the buffer, while they are served
        self._n = self._at = self._stop = 0  # rows in the buffer; served up to, to be served up to, in that order
        self._served = self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Rows:
        while self._order is None or self._at >= self._stop:
            self._close_up()
            self._fill()
            self._deal()
            if self._stop == 0:
                raise StopIteration
        rows = self._order[self._at : min(self._at + self._sizes.batch_tokens, self._stop)]
        self._at += self._sizes.batch_tokens
        self._served = True
        return {name: self._pick(x, rows) for name, x in self._buffer.items()}

    def begin(self, place: Place) -> Self:
        """Begin with the chunks from a place on; self."""
        self._chunks, self._chunk = self._source(place), Chunk(place, place, {})
        return self

    def snapshot(self) -> State:
        """The place after the last batch, with what the buffer holds; a copy of nothing."""
        tensors = {f"buffer.{name}": x[: self._n] for name, x in self._buffer.items()}
        tensors["generator"] = self._generator.get_state()
        if self._order is not None:
            tensors["order"] = self._order
        done = self._taken == self._of
        numbers = {name: getattr(self, f"_{name}") for name in ("n", "at", "stop", "served", "ended")}
        numbers |= {"place": list(self._chunk.end if done else self._chunk.start), "taken": 0 if done else self._taken}
        devices = {name: str(x.device) for name, x in self._buffer.items()}
        return State(tensors, {**numbers, "devices": devices})

    def restore(self, state: State) -> Self:
        """Go on from a `snapshot` of a shuffle of the same source, sizes and seed; self."""
        n, place = state.numbers, Place(*state.numbers["place"])
        self._generator.set_state(state.tensors["generator"])
        self._order = state.tensors.get("order")
        self._n, self._at, self._stop = n["n"], n["at"], n["stop"]
        self._served, self._ended = n["served"], n["ended"]
        for name, x in state.of("buffer.").tensors.items():
            self._make(name, x, torch.device(n["devices"][name]))
            self._buffer[name][: self._n] = x.to(n["devices"][name])
        self._chunks = self._source(place)
        self._chunk = Chunk(place, place, {})
        if n["taken"]:
            self._next_chunk()
            self._taken = n["taken"]
        return self

    def _fill(self) -> None:
        while self._n < self._sizes.buffer_tokens and not self._ended:
            if self._taken == self._of:
                self._next_chunk()
                continue
            taken = min(self._of - self._taken, self._sizes.buffer_tokens - self._n)
            for name, rows in self._chunk.rows.items():
                if name not in self._buffer:
                    self._make(name, rows, rows.device)
                part = rows[self._taken : self._taken + taken]
                self._buffer[name][self._n : self._n + taken].copy_(part, non_blocking=True)
            self._n += taken
            self._taken += taken

    def _next_chunk(self) -> None:
        found = next(self._chunks, None)
        if found is None:
            self._ended = True
            self._chunk = Chunk(self._chunk.end, self._chunk.end, {})
            self._taken = self._of = 0
        else:
            self._chunk, self._taken = found, 0
            self._of = len(next(iter(found.rows.values())))

    def _deal(self) -> None:
        """Put the rows of the buffer in a random order, and say how many of them are served."""
        self._order = torch.randperm(self._n, generator=self._generator)
        self._at, batch = 0, self._sizes.batch_tokens
        if self._n == self._sizes.buffer_tokens:
            self._stop = max(self._n // 2 // batch, 1) * batch
        else:
            self._stop = self._n // batch * batch or (0 if self._served else self._n)

    def _close_up(self) -> None:
        """Put what was not served at the front."""
        if self._order is None:
            return
        left = self._order[self._stop :]
        for x in self._buffer.values():
            x[: len(left)] = x[left.to(x.device)]
        self._n, self._order = len(left), None

    def _make(self, name: str, like: Tensor, device: torch.device) -> None:
        shape = self._sizes.buffer_tokens, like.shape[1]
        if device.type == "cpu" or self._host:
            pinned = torch.cuda.is_available() and self._host
            self._buffer[name] = torch.empty(shape, dtype=like.dtype, pin_memory=pinned)
        else:
            self._buffer[name] = torch.empty(shape, dtype=like.dtype, device=device)

    def _pick(self, x: Tensor, rows: Tensor) -> Tensor:
        if not x.is_pinned():
            return x[rows.to(x.device)]
        # a copy out of pinned memory into pinned memory, from which it travels beside other work
        return torch.index_select(x, 0, rows, out=torch.empty(len(rows), x.shape[1], dtype=x.dtype, pin_memory=True))
