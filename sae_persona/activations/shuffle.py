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
from sae_persona.errors import ConfigError, DataError
from sae_persona.types import State

Rows = dict[str, Tensor]
CPU = torch.device("cpu")


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
    device   where the rows are
    host     keep the buffer in the host's memory, pinned, even if the rows are on a GPU

    Each batch has [batch_tokens, d] by name. Every row comes once, except that rows left at the end which do not fill
    a batch are dropped, unless they are all there is: then they are one short batch. The same seed and rows give the
    same batches.
    """

    def __init__(
        self, source: Callable[[Place], Iterator[Chunk]], sizes: Sizes, *, seed: int,
        device: torch.device = CPU, host: bool = False,
    ) -> None:  # fmt: skip
        self._source, self._sizes, self._host, self._device = source, sizes, host, device
        self._chunks = source(Place())
        self._generator = torch.Generator().manual_seed(seed)
        self._buffer: Rows = {}
        self._chunk = Chunk(Place(), Place(), {})
        self._taken = self._of = 0  # rows of the chunk in the buffer, rows of the chunk
        self._order: Tensor | None = None  # of the rows in the buffer, while they are served
        self._here: Tensor | None = None  # the same beside the buffer
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
        assert self._here is not None, "an order is dealt on both sides"
        rows = self._here[self._at : min(self._at + self._sizes.batch_tokens, self._stop)]
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
        return State(tensors, numbers)

    def restore(self, state: State) -> Self:
        """Go on from a `snapshot` of a shuffle of the same source, sizes and seed; self."""
        n, place = state.numbers, Place(*state.numbers["place"])
        self._generator.set_state(state.tensors["generator"])
        self._order = state.tensors.get("order")
        self._here = None if self._order is None else self._order.to(self._place)
        self._n, self._at, self._stop = n["n"], n["at"], n["stop"]
        self._served, self._ended = n["served"], n["ended"]
        for name, x in state.of("buffer.").tensors.items():
            self._make(name, x)
            self._buffer[name][: self._n] = x.to(self._buffer[name].device)
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
                    self._make(name, rows)
                if rows.dtype != self._buffer[name].dtype:
                    raise DataError(
                        f"activations were {self._buffer[name].dtype}, now {rows.dtype}: load the model as then"
                    )
                part = rows[self._taken : self._taken + taken]
                self._buffer[name][self._n : self._n + taken].copy_(part, non_blocking=True)
            self._n += taken
            self._taken += taken
        if self._host and self._device.type == "cuda":  # what the host is about to read has to have arrived
            torch.cuda.current_stream(self._device).synchronize()

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
        self._here = self._order.to(self._place)  # once, since each such copy makes the host wait for the GPU
        self._at, batch = 0, self._sizes.batch_tokens
        if self._n == self._sizes.buffer_tokens:
            self._stop = max(self._n // 2 // batch, 1) * batch
        else:
            self._stop = self._n // batch * batch or (0 if self._served else self._n)

    def _close_up(self) -> None:
        """Put what was not served at the front."""
        if self._order is None or self._here is None:
            return
        left = self._here[self._stop :]
        for x in self._buffer.values():
            x[: len(left)] = x[left]
        self._n, self._order = len(left), None

    @property
    def _place(self) -> torch.device:
        """Of the buffer."""
        return CPU if self._host else self._device

    def _make(self, name: str, like: Tensor) -> None:
        shape = self._sizes.buffer_tokens, like.shape[1]
        pinned = self._host and self._device.type == "cuda"
        self._buffer[name] = torch.empty(shape, dtype=like.dtype, device=self._place, pin_memory=pinned)

    def _pick(self, x: Tensor, rows: Tensor) -> Tensor:
        if not x.is_pinned():
            return x[rows]
        # a copy out of pinned memory into pinned memory, from which it travels beside other work
        return torch.index_select(x, 0, rows, out=torch.empty(len(rows), x.shape[1], dtype=x.dtype, pin_memory=True))
