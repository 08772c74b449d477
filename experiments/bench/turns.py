"""One shape on the GPU: which modes fit into memory together, their times in turns with the product, their rows."""

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import triton
from torch import Tensor

from experiments.bench import check, floor, ledger, modes, peers

RESULTS = "gpu_results.csv"
SPARE_GB = 3.0  # of the card, left to cuBLAS, compiled kernels and fragments
ANCHOR = "exact"


class Stop(Exception):
    """Nothing more can be measured in this process."""


@dataclass
class Run:
    """How to measure, where to write, and what went wrong so far."""

    out: Path
    rounds: int
    n_burst: int
    until: float
    red: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / "step.log").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def failed(self, what: str, why: str) -> None:
        self.red.append(what)
        self.say(f"RED   {what}: {why}")
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise Stop(f"the card answers no more after {what}; run again without it ({error})") from error

    def late(self) -> bool:
        return time.monotonic() > self.until


@dataclass
class Timed:
    """A mode that is in memory: its losses on the first batch, when it began and now, and the memory that it took."""

    call: Callable[[Tensor], object]
    first_loss: float
    loss: float
    peak_gb: float
    stepping_gb: float
    recall: float | None = None


class Bench:
    """One shape: its data, its floor, and the modes that are in memory together."""

    def __init__(self, run: Run, shape: modes.Shape, *, lean: bool = False) -> None:
        self.run, self.shape, self.lean = run, shape, lean
        self.copy = floor.copy_tb_s(1.0 if lean else 4.0)
        free()
        self.dictionary, self.batches = modes.data(shape)
        self.loss = check.topk_loss(self.dictionary, self.batches[0], shape.k)
        self.product = floor.Product(self.dictionary, shape.n)
        self.group: dict[str, Timed] = {}
        self.reported: set[str] = set()
        run.say(f"\n== {shape}   copy {self.copy:.3f} TB/s   loss in plain torch {self.loss:.4f}")

    def measure(self, names: list[str]) -> None:
        for name in names:
            if self.run.late():
                self.run.say(f"skip  {name}: out of time")
                continue
            need, there = self._need(name), room()
            if need > there and set(self.group) - self.reported:
                self._time_group()
                there = room()
            if need > there and self.group:  # not even beside the anchor
                self._drop(everything=True)
                there = room()
            if need > there:
                self.run.say(f"skip  {name}: needs about {need / 1e9:.1f} GB, there are {there / 1e9:.1f}")
                continue
            self._add(name)
        if set(self.group) - self.reported:
            self._time_group()
        self._drop(everything=True)

    def _need(self, name: str) -> float:
        if name in peers.PEERS:
            return peers.memory(name, self.shape.weights, self.shape.n * self.shape.n_latents)
        given = 4 * self.shape.weights / 2 if self.lean else 0  # the dictionary becomes the decoder
        return modes.memory(modes.EVERY[name], self.shape) - given

    def _add(self, name: str) -> None:
        """Build the mode, take three steps, and keep it if its first loss is right."""
        what = f"{name} at {self.shape}"
        full = False
        try:
            timed = self._build(name)
        except torch.OutOfMemoryError as error:
            full = True
            if not self.group:
                self.run.say(f"skip  {name}: the estimate of {self._need(name) / 1e9:.1f} GB was too low: {error}")
        except Exception:  # noqa: BLE001 a mode that breaks must not cost the others their numbers; it is reported
            self.run.failed(what, traceback.format_exc(limit=-4))
        else:
            if wrong := self._wrong(name, timed):
                self.run.failed(what, wrong)
            else:
                self.group[name] = timed
                text = f"loss {timed.first_loss:.4f}, then {timed.loss:.4f}"
                text += f"; peak {timed.peak_gb:.2f} GB, in steps {timed.stepping_gb:.2f}"
                self.run.say(f"ready {name:13} {text}" + (f"; recall {timed.recall:.4f}" if timed.recall else ""))
        free()
        if full and self.group:  # once more, alone
            if set(self.group) - self.reported:
                self._time_group()
            self._drop(everything=True)
            self._add(name)

    def _wrong(self, name: str, timed: Timed) -> str:
        """Why a mode must not be timed; nothing if it may."""
        mode = modes.EVERY.get(name, modes.Mode())
        if not math.isfinite(timed.first_loss + timed.loss):
            return f"its loss is {timed.first_loss}, then {timed.loss}"
        if mode.is_topk and abs(timed.first_loss - self.loss) > check.LOSS_OFF * self.loss:
            return f"its loss is {timed.first_loss}, plain torch has {self.loss}"
        if timed.recall is not None and timed.recall < modes.least_recall(mode):
            return f"its recall is {timed.recall}: it has returned to bf16"
        return ""

    def _build(self, name: str) -> Timed:
        """Make the mode and warm it up, until it does all that it does in training."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        first = self.batches[0]
        mode = modes.EVERY.get(name, modes.Mode())
        weights = modes.fresh(self.dictionary, dead=mode.dead, give=self.lean)
        if self.lean:
            before -= self.dictionary.nbytes
            del self.dictionary
        step, n_warm = None, 3
        if name == "plain_dense":
            call = modes.call_of(peers.PlainDense(weights, self.shape.k))
        elif name == "sae_lens":
            call = peers.saelens(weights, self.shape.k, lr=modes.LR, bf16=True)[1]
        else:
            step, n_warm = modes.kernel_step(mode, self.shape, weights, first), modes.warm_steps(mode)
            call = modes.call_of(step)
        del weights
        making = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        first_loss = check.loss_of(call(first))
        for i in range(n_warm):
            call(self.batches[i % len(self.batches)])
        loss = check.loss_of(call(first))
        stepping = torch.cuda.max_memory_allocated() - before
        return Timed(call, first_loss, loss, max(making, stepping) / 1e9, stepping / 1e9, modes.recall(step))

    def _time_group(self) -> None:
        """Time what is in memory beside the product, write it down, and let go of all but the anchor."""
        calls: dict[str, Callable[[Tensor], object]] = {"product_bf16": self.product}
        if not self.reported:
            try:
                calls["product_fp8"] = floor.Fp8Product(self.product, self.batches[0])
            except RuntimeError as error:
                self.run.say(f"note  no fp8 product at this shape: {str(error).splitlines()[0]}")
        calls |= {name: timed.call for name, timed in self.group.items()}
        ms, failed = floor.take_turns(
            calls, self.batches, rounds=self.run.rounds, n_burst=self.run.n_burst, until=self.run.until
        )
        failed |= self._changed(ms)
        if "product_bf16" in ms:
            self._report({name: values for name, values in ms.items() if name not in failed})
        for name, why in failed.items():
            self.group.pop(name, None)
            self.run.failed(f"{name} at {self.shape}", why)
        del calls
        self._drop()

    def _changed(self, timed: Iterable[str]) -> dict[str, str]:
        """Which modes no longer have the loss that they began with, though the learning rate is almost 0."""
        changed = {}
        for name in set(timed) & set(self.group):
            first = self.group[name].loss
            try:
                last = check.loss_of(self.group[name].call(self.batches[0]))
            except Exception:  # noqa: BLE001 as above
                changed[name] = traceback.format_exc(limit=-4)
                continue
            if not abs(last - first) <= check.LOSS_OFF * first:
                changed[name] = f"the loss went from {first} to {last} while it was timed"
        return changed

    def _report(self, ms: dict[str, Tensor]) -> None:
        product = ms["product_bf16"].median().item()
        least = floor.floor_ms(product, self.shape, self.copy)
        exact = ms[ANCHOR].median().item() if ANCHOR in ms else None
        self.run.say(f"{'':19}   ms p20      p50      p80  x floor   M tok/s  peak GB   floor {least:.3f} ms")
        for name, values in ms.items():
            if name in self.reported:
                continue
            self.reported.add(name)
            low, middle, high = (values.quantile(q).item() for q in (0.2, 0.5, 0.8))
            timed = self.group.get(name)
            row = identity(self.shape) | {"mode": name, "ms_p20": low, "ms_p50": middle, "ms_p80": high}
            row |= {"floor_ms": least, "x_floor": middle / least, "product_ms": product, "copy_tb_s": self.copy}
            row["peak_gb"] = timed.peak_gb if timed else ""
            row |= {"x_exact": middle / exact if exact and timed else "", "rounds": len(values)}
            rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            ledger.append(self.run.out / RESULTS, rounded)
            peak = f"{timed.peak_gb:8.2f}" if timed else " " * 8
            rate = self.shape.n / middle / 1e3
            line = f"{name:18} {low:8.3f} {middle:8.3f} {high:8.3f} {middle / least:8.2f} {rate:9.3f} {peak}"
            if exact and timed and name != ANCHOR:
                line += f"   {middle / exact:.3f} x exact, {(middle - exact) / least:+.2f} floors"
            self.run.say(line)

    def _drop(self, *, everything: bool = False) -> None:
        keep = {} if everything else {name: timed for name, timed in self.group.items() if name == ANCHOR}
        self.group.clear()
        self.group |= keep
        free()


def identity(shape: modes.Shape) -> dict[str, object]:
    """What a row of the ledger begins with."""
    return {
        "commit": ledger.commit(),
        "date": date.today().isoformat(),
        "gpu": card(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": str(shape),
    }


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def room() -> float:
    """Bytes that can still be allocated."""
    free()
    return torch.cuda.mem_get_info()[0] - SPARE_GB * 1e9


def card() -> str:
    return torch.cuda.get_device_name()
