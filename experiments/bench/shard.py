"""A dictionary shared by several GPUs beside one GPU that has it all: checked first, then timed in turns.

    torchrun --nproc-per-node 2 -m experiments.bench.shard [--shape S|M|L] [--double] [--rounds 12] [--burst 4]
        [--moments fp32|bf16] [--out experiments/bench] [--tiny]

The check: on a small dictionary the ranks together have the losses of one KernelStep for six steps, within 1 %, and
b_dec is the same on all of them to the bit; at the shape itself both have the loss of plain torch. What fails is RED
and makes the exit status 1. Then one GPU alone and all together take turns. ``--double``: the ranks share twice the
latents of the one. Appends two rows to <out>/gpu_results.csv: `alone`, and `shard2` for two ranks, whose x_exact is
its time over that of `alone`.

``--tiny``: gloo and plain torch on a CPU, sizes that show that it runs, and no rows.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.bench import check, floor, ledger, modes, planted
from experiments.bench.turns import RESULTS, identity
from sae_persona.sae.plain_step import PlainStep
from sae_persona.sae.shard import ALONE, Shard, joined
from sae_persona.sae.sparsity import TopK
from sae_persona.sae.step import Weights

TINY, TINY_CHECK = modes.Shape(32, 512, k=4, n=64), modes.Shape(16, 129, k=3, n=32)
WARM = 4


@dataclass(frozen=True)
class Bench:
    """How both steps are made and timed on a device."""

    shard: Shard
    device: str
    moments: str

    def say(self, text: str) -> None:
        if self.shard.rank == 0:
            print(text, flush=True)

    def data(self, shape: modes.Shape) -> tuple[Tensor, list[Tensor]]:
        """The dictionary and batches of rank 0, on all ranks."""
        dictionary = planted.atoms(shape.n_latents, shape.d_in, seed=0, device=self.device)
        batches = [planted.batch(dictionary, shape.n, seed=1 + i) for i in range(4)]
        if self.device == "cpu":
            batches = [x.float() for x in batches]
        for x in (dictionary, *batches):
            if self.shard.world > 1:
                dist.broadcast(x, 0)
        return dictionary, batches

    def step(self, dictionary: Tensor, shape: modes.Shape, shard: Shard) -> Any:
        rows = shard.block(dictionary)
        weights = Weights(rows.clone(), rows.new_zeros(len(rows)), rows.clone(), rows.new_zeros(shape.d_in))
        settings = {"k_aux": 0, "auxk_coef": 0.0, "dead_after": modes.NEVER, "shard": shard}
        if self.device == "cpu":
            return PlainStep(weights, TopK(shape.k), **settings)
        from sae_persona.sae.kernel_plan import KernelConfig
        from sae_persona.sae.kernel_step import KernelStep

        return KernelStep(weights, TopK(shape.k), config=KernelConfig(moments=self.moments), **settings)  # pyright: ignore[reportArgumentType]

    def burst(self, call: Callable[[Tensor], object], batches: list[Tensor], calls: int) -> float:
        """Milliseconds a call, of ``calls`` back to back."""
        if self.device != "cpu":
            return floor.burst(call, batches, calls)
        start = time.perf_counter()
        for i in range(calls):
            call(batches[i % len(batches)])
        return 1e3 * (time.perf_counter() - start) / calls

    def meet(self) -> None:
        if self.shard.world > 1:
            self.shard.total(1)


def same_losses(bench: Bench, shape: modes.Shape) -> str:
    """What is wrong with the ranks' training; nothing if it is that of one."""
    dictionary, batches = bench.data(shape)
    shared, alone = bench.step(dictionary, shape, bench.shard), bench.step(dictionary, shape, ALONE)
    worst = 0.0
    for i in range(check.STEPS):
        x = batches[i % len(batches)]
        got, want = (check.loss_of(step(x, check.LR)) for step in (shared, alone))
        worst = max(worst, abs(got - want) / want if got == got else torch.inf)
    everyone = bench.shard.gather(shared.weights.b_dec)
    if not (everyone == everyone[0]).all():
        return "b_dec is not the same on all ranks"
    bench.say(f"check of {shape}: losses at most {worst:.1e} apart, the last {got:.4f} for {want:.4f}")
    return "" if worst <= check.LOSS_OFF else f"losses are {worst:.1e} apart"


def ready(bench: Bench, name: str, step: Any, batches: list[Tensor], wanted: float) -> str:
    """Warm it up; what is wrong with its first loss."""
    loss = check.loss_of(step(batches[0], modes.LR))
    for i in range(WARM):
        step(batches[i % len(batches)], modes.LR)
    bench.say(f"ready {name:8} loss {loss:.4f}, plain torch has {wanted:.4f}")
    return "" if abs(loss - wanted) <= check.LOSS_OFF * wanted else f"{name}: loss {loss} in place of {wanted}"


def exchange(bench: Bench, shape: modes.Shape) -> Callable[[Tensor], object]:
    """The exchanges of a step and nothing else."""
    acts = torch.zeros(shape.n, shape.k, device=bench.device)
    sums = torch.zeros(1, shape.n, shape.d_in, device=bench.device)
    return lambda _: (bench.shard.gather(acts), bench.shard.sum(sums))


def measure(bench: Bench, shape: modes.Shape, a: argparse.Namespace) -> list[str]:
    """Time both; what went wrong."""
    wide = replace(shape, n_latents=2 * shape.n_latents) if a.double else shape
    dictionary, batches = bench.data(wide)
    shared = bench.step(dictionary, wide, bench.shard)
    wrong = [ready(bench, "shared", shared, batches, check.topk_loss(dictionary, batches[0], wide.k))]
    alone = None
    if bench.shard.rank == 0:
        few = dictionary[: shape.n_latents].contiguous()
        alone = bench.step(few, shape, ALONE)
        wrong.append(ready(bench, "alone", alone, batches, check.topk_loss(few, batches[0], shape.k)))
        del few
    del dictionary
    times: dict[str, list[float]] = {"alone": [], "shared": [], "exchange": []}
    calls = {"shared": modes.call_of(shared), "exchange": exchange(bench, wide)}
    for i in range(-1, a.rounds):
        bench.meet()
        found = {"alone": bench.burst(modes.call_of(alone), batches, a.burst)} if alone is not None else {}
        for name, call in calls.items():
            bench.meet()
            found[name] = bench.burst(call, batches, a.burst)
        for name, ms in found.items():
            if i >= 0:  # the first round warms up
                times[name].append(ms)
    if bench.shard.rank == 0:
        report(bench, shape, wide, {name: torch.tensor(ms) for name, ms in times.items()}, a)
    bench.meet()
    return [one for one in wrong if one]


def report(bench: Bench, shape: modes.Shape, wide: modes.Shape, ms: dict[str, Tensor], a: argparse.Namespace) -> None:
    middle = {name: values.median().item() for name, values in ms.items()}
    for name, what in (("alone", shape), ("shared", wide)):
        low, high = (ms[name].quantile(q).item() for q in (0.2, 0.8))
        rate = what.n / middle[name] / 1e3
        bench.say(f"{name:8} {low:8.3f} {middle[name]:8.3f} {high:8.3f} ms   {rate:.3f} M tok/s   {what}")
        if bench.device == "cpu":
            continue
        mode = "alone" if name == "alone" else f"shard{bench.shard.world}"
        row = identity(what) | {"mode": mode, "ms_p20": low, "ms_p50": middle[name], "ms_p80": high}
        row |= dict.fromkeys(("floor_ms", "x_floor", "product_ms", "copy_tb_s"), "")
        row |= {"peak_gb": "", "x_exact": middle[name] / middle["alone"], "rounds": len(ms[name])}
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        ledger.append(a.out / RESULTS, rounded)
    bench.say(f"exchange {middle['exchange']:.3f} ms of it")
    bench.say(f"{bench.shard.world} ranks: {middle['alone'] / middle['shared']:.3f} times the tokens a second of one")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(modes.SHAPES), default="L")
    parser.add_argument("--double", action="store_true", help="the ranks share twice the latents")
    parser.add_argument("--moments", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--burst", type=int, default=4, help="calls timed together")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def main() -> int:
    a = parsed()
    device = "cpu" if a.tiny else modes.DEVICE
    with joined(device) as shard:
        bench = Bench(shard, device, a.moments)
        if shard.world == 1:
            bench.say("one rank shares nothing: torchrun --nproc-per-node 2 -m experiments.bench.shard")
            return 2
        shape = TINY if a.tiny else modes.Shape(*modes.SHAPES[a.shape])
        red = [wrong] if (wrong := same_losses(bench, TINY_CHECK if a.tiny else check.SMALL)) else []
        # all or none go on: the next exchange needs every rank
        red = red if shard.most(len(red)) else measure(bench, shape, a)
    for wrong in red:
        print(f"RED   rank {shard.rank}: {wrong}", flush=True)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
