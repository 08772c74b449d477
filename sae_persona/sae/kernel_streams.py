"""What of a step runs at the same time as what. On a CPU one thing comes after the other."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Streams:
    """Three streams beside the caller's: the step's own, one of lower priority, and one for small work.

    While `overlapping`, the step runs on a stream of high priority, and what is done `later` on one of low priority:
    beside the next step, in what that leaves free of the multiprocessors.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._own: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._small: torch.cuda.Stream | None = None
        self.overlapping = False

    @contextmanager
    def step(self, *, overlap: bool) -> Iterator[None]:
        """The block runs after all that the caller's stream has in hand, and the caller's stream after the block."""
        self.overlapping = overlap and self._cuda
        if not self.overlapping:
            self.wait()
            yield
            return
        if self._own is None:
            self._own = torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=0)
        outer, own = torch.cuda.current_stream(), self._own[0]
        own.wait_stream(outer)
        with torch.cuda.stream(own):
            yield
        outer.wait_stream(own)

    @contextmanager
    def later(self) -> Iterator[None]:
        """The block runs after all that the step has in hand; `wait` for it."""
        if not self.overlapping or self._own is None:
            yield
            return
        self._own[1].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._own[1]):
            yield

    def wait(self) -> None:
        """Let the current stream wait for what runs later."""
        if self._own is not None:
            torch.cuda.current_stream().wait_stream(self._own[1])

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The block runs beside what follows it, until `join`."""
        if not self._cuda:
            yield
            return
        self._small = self._small or torch.cuda.Stream(priority=-1)
        self._small.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._small):
            yield

    def join(self) -> None:
        """Let the current stream wait for what was put aside."""
        if self._small is not None:
            torch.cuda.current_stream().wait_stream(self._small)
