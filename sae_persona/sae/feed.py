"""Checked batches for training, one step after another, from a place that can be told and found again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor

from sae_persona.errors import DataError
from sae_persona.types import State

ONLY = ""  # the key of batches that come alone
Batch = dict[str, Tensor]


@runtime_checkable
class Resumable(Protocol):
    """Batches that can go on from a place: what their iterators call `snapshot`."""

    def resume(self, state: State) -> Iterator[Any]: ...


@runtime_checkable
class Joinable(Protocol):
    """Batches of one of several ranks, that can go on where another number of ranks has been."""

    def join(self, states: Sequence[State], rank: int, world: int) -> Iterator[Any]: ...


class Feed:
    """An iterator over batches: each once, or ``steps`` of them, starting over when they end.

    batches   of tensors [n, d_in], or of dicts of such by name (a hook point's, say), always the same names
    device    where they go; None: they stay where they are. On a CPU they become fp32

    DataError: no batch, too few for ``steps``, another shape, NaN or infinity on a CPU (on a GPU the step finds out,
    without making the host wait).
    """

    def __init__(self, batches: Iterable[Any], steps: int | None, device: torch.device | None = None) -> None:
        self.batches, self.steps, self.device = batches, steps, device
        self.served = self.in_round = 0
        self.at = "cpu"  # the device of the last batch
        self._widths: dict[str, int] = {}
        self._source = iter(batches)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self.served == self.steps:
            raise StopIteration
        found = next(self._source, None)
        if found is None:
            self._start_over()
            found = next(self._source, None)
        if found is None:
            raise DataError(f"the batches ended after {self.served} of {self.steps} steps: give a list, or fewer steps")
        batch = self._checked(found)
        self.served += 1
        self.in_round += 1
        return batch

    def beyond(self, n_tokens: int) -> list[Batch]:
        """What comes after the last step, in this round, as far as ``n_tokens`` go: activations not trained on."""
        found: list[Batch] = []
        while sum(len(next(iter(batch.values()))) for batch in found) < n_tokens:
            more = next(self._source, None)
            if more is None:
                break
            found.append(self._checked(more))
        return found

    def snapshot(self) -> State:
        """The place after the last batch."""
        numbers = {"served": self.served, "in_round": self.in_round, "device": self.at}
        snapshot = getattr(self._source, "snapshot", None)
        return State({}, numbers) if snapshot is None else snapshot().under("source.").joined(State({}, numbers))

    def join(self, states: Sequence[State], rank: int, world: int) -> None:
        """Go on where other ranks, ``states`` one each, have been, as rank ``rank`` of now ``world``.

        Not to the bit: their buffers are left behind, and texts go on from the earliest that any of them had come to.
        """
        self.served = states[0].numbers["served"]
        if isinstance(self.batches, Joinable):
            self._source = self.batches.join([state.of("source.") for state in states], rank, world)
            return
        self._source = iter(self.batches)
        self.in_round = sum(1 for _ in islice(self._source, states[0].numbers["in_round"]))

    def resume(self, state: State) -> None:
        """Go on at the place of ``state``, to the bit; batches that know no places are gone through up to there."""
        self.served, self.in_round = state.numbers["served"], state.numbers["in_round"]
        if isinstance(self.batches, Resumable):
            self._source = self.batches.resume(state.of("source."))
        else:
            self._source = iter(self.batches)
            skipped = sum(1 for _ in islice(self._source, self.in_round))
            if skipped < self.in_round:
                raise DataError(f"training left off after {self.in_round} batches, now there are {skipped}")

    def _start_over(self) -> None:
        if self.served == 0:
            raise DataError("there is no batch to train on: look at the texts, or at the list of batches")
        if self.steps is None:
            raise StopIteration
        self._source = iter(self.batches)
        self.in_round = 0

    def _checked(self, found: Any) -> Batch:
        batch = cast(Batch, dict(found) if isinstance(found, Mapping) else {ONLY: found})
        for name, x in batch.items():
            self._check(name, x)
            if self.device is not None:
                x = x.to(self.device, non_blocking=True)
            batch[name] = x if x.is_cuda else x.float()
            self.at = str(x.device)
        return batch

    def _check(self, name: str, x: Tensor) -> None:
        width = self._widths.get(name)
        right = x.ndim == 2 and len(x) > 0 and x.shape[1] == (width or x.shape[1])
        if not right or not x.is_floating_point():
            wanted = f"[n, {width or 'd_in'}]"
            raise DataError(f"batch {self.served} must be floats {wanted}, got {x.dtype} {list(x.shape)}")
        if not x.is_cuda and not x.isfinite().all():
            raise DataError(f"batch {self.served} has NaN or infinite activations: load the model with dtype float32")
        self._widths[name] = x.shape[1]
