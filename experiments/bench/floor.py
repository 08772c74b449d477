"""What the card can do, measured: copying, the encoder's product, and times of calls that take turns."""

import time
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from experiments.bench import modes

ADAM_BYTES = 24  # a weight: the weight and both moments, fp32, read and written
AT_ONCE = 2**31  # elements of a product's result
FP8 = torch.float8_e4m3fn
LEAST_ROUNDS = 3


def burst(call: Callable[[Tensor], object], batches: Sequence[Tensor], calls: int) -> float:
    """Milliseconds a call, of ``calls`` back to back.

    One call before them fills the queue, so what is timed is the pace of training: host time counts where it is the
    longer, and of work beside the main stream as much is inside as a step has.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    call(batches[-1])
    start.record()
    for i in range(calls):
        call(batches[i % len(batches)])
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def take_turns(
    calls: dict[str, Callable[[Tensor], object]],
    batches: Sequence[Tensor],
    *,
    rounds: int,
    n_burst: int,
    until: float,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Milliseconds of each call in each round, the order turning round by round; what failed, with its traceback.

    A large product is limited by power and drifts by a tenth and more: what is compared has to be measured in turns.
    After the time ``until`` (of time.monotonic) no round begins, if there were three.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for i in range(-1, rounds):
        if i >= LEAST_ROUNDS and time.monotonic() > until:
            break
        for name in list(calls)[:: -1 if i % 2 else 1]:
            if name in failed:
                continue
            try:
                ms = burst(calls[name], batches, n_burst)
            except Exception:  # noqa: BLE001 a mode that breaks must not cost the others their numbers; it is reported
                failed[name] = traceback.format_exc(limit=-4)
                continue
            if i >= 0:  # the first round warms up
                times[name].append(ms)
    return {name: torch.tensor(ms) for name, ms in times.items() if name not in failed}, failed


def copy_tb_s(gib: float = 4.0) -> float:
    """Terabytes a second that copying fp32 reads and writes."""
    source = torch.rand(int(gib * 2**28), device=modes.DEVICE)
    target = torch.empty_like(source)
    ms = torch.tensor([burst(lambda _: target.copy_(source), [source], 2) for _ in range(6)])[1:]
    return 2 * source.numel() * 4 / ms.median().item() / 1e9


class Product:
    """x @ W^T in bf16 by cuBLAS, W padded to 64 latents, where the fastest kernels are."""

    def __init__(self, dictionary: Tensor, n: int) -> None:
        n_latents, d_in = dictionary.shape
        rows = -(-n_latents // 64) * 64
        self.w = dictionary.new_zeros(rows, d_in, dtype=torch.bfloat16)
        self.w[:n_latents] = dictionary
        self.at_once = max(1, min(n, AT_ONCE // rows))
        self.out = self.w.new_empty(self.at_once, rows)

    def __call__(self, x: Tensor) -> None:
        for part in x.split(self.at_once):
            torch.mm(part, self.w.T, out=self.out[: len(part)])


class Fp8Product:
    """The same in e4m3, for information: one scale a tensor, fast accumulation, x rounded beforehand."""

    def __init__(self, product: Product, x: Tensor) -> None:
        # rows have norm 1: without a factor their values would be e4m3's smallest
        self.w = (product.w * product.w.shape[1] ** 0.5).to(FP8).T
        self.one = torch.ones((), device=product.w.device)
        self.parts = [part.to(FP8) for part in x.split(product.at_once)]
        self(x)  # raises where there is none

    def __call__(self, x: Tensor) -> None:
        for part in self.parts:
            torch._scaled_mm(
                part, self.w, scale_a=self.one, scale_b=self.one, out_dtype=torch.bfloat16, use_fast_accum=True
            )


def floor_ms(product_ms: float, shape: modes.Shape, tb_s: float) -> float:
    """The product, and Adam's traffic at copying speed."""
    return product_ms + ADAM_BYTES * shape.weights / tb_s / 1e9
