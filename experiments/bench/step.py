"""The training step on a GPU beside its floor and plain PyTorch: checked first, then timed in turns.

    python -m experiments.bench.step [--shapes S,M,L] [--modes all|targets|exact,fp8,...] [--sweep [NAME,...]]
        [--rounds 12] [--burst 4] [--n 8192] [--k 32] [--seconds 540] [--no-peers] [--no-check]
        [--out experiments/bench]

Each mode first trains a small SAE beside `PlainStep` and, at each shape, has to have the loss of plain fp32 torch; what
does not is RED, is not timed, and makes the exit status 1. Then product, modes and peers take turns, in groups that fit
the memory, `exact` in each of them. Appends a row a shape and mode to <out>/gpu_results.csv after every group, and
every line it prints to <out>/step.log. README.md explains the columns.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import triton

from experiments.bench import check, floor, ledger, modes, peers
from experiments.bench.turns import Bench, Run, Stop, card, free, room

SWEEP_MODES, LEAN_MODES = ["exact", "fp8"], ["slices_bf16"]
SWEEP_ROUNDS = 5


def check_all(run: Run, names: list[str]) -> list[str]:
    """Those of the names that train as `PlainStep` does."""
    good = []
    for name in dict.fromkeys([*names, "fp32"]):
        start = time.monotonic()
        try:
            right, text = check.small_step(name)
        except Exception:  # noqa: BLE001 as above: reported, and the mode is not timed
            run.failed(f"check of {name}", traceback.format_exc(limit=-4))
            continue
        finally:
            free()
        if right:
            good.append(name)
            run.say(f"green {name:13} {text}   {time.monotonic() - start:.1f} s")
        else:
            run.failed(f"check of {name}", text)
    return [name for name in names if name in good]


def measure(run: Run, shape: modes.Shape, names: list[str], *, lean: bool = False) -> None:
    """Measure the modes at one shape; what breaks is reported, and the next shape has its turn."""
    if run.late():
        run.say(f"skip  {shape}: out of time")
        return
    if not names:
        run.say(f"skip  {shape}: no mode is left to time")
        return
    try:
        if lean:  # the dictionary, the product's copy of it and its result must fit, too
            out = min(shape.n * shape.n_latents, floor.AT_ONCE) * 2
            need = modes.memory(modes.EVERY[names[0]], shape) + shape.weights + out
            if need > room():
                run.say(f"skip  {shape}: needs about {need / 1e9:.0f} GB, there are {room() / 1e9:.0f}")
                return
        Bench(run, shape, lean=lean).measure(names)
    except Stop:
        raise
    except Exception:  # noqa: BLE001 as above
        run.failed(str(shape), traceback.format_exc(limit=-6))
    finally:
        free()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="of S, M, L; all three, but none with --sweep")
    parser.add_argument("--modes", help="all, targets, or names; all, but exact,fp8 in a sweep")
    parser.add_argument("--sweep", nargs="?", const="all", help=f"all, or of {', '.join(modes.SWEEP)}")
    parser.add_argument("--rounds", type=int, default=12, help=f"of turns; at most {SWEEP_ROUNDS} in a sweep")
    parser.add_argument("--burst", type=int, default=4, help="calls timed together")
    parser.add_argument("--n", type=int, default=8192, help="tokens a batch at S, M and L")
    parser.add_argument("--k", type=int, default=32, help="latents kept at S, M and L")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing new is begun")
    a = parser.parse_args()
    a.shapes = [s for s in (a.shapes or ("" if a.sweep else "S,M,L")).split(",") if s]
    a.sweep = list(modes.SWEEP) if a.sweep == "all" else [s for s in (a.sweep or "").split(",") if s]
    try:
        a.full, a.few = modes.names_of(a.modes or "all"), modes.names_of(a.modes) if a.modes else SWEEP_MODES
    except ValueError as error:
        parser.error(str(error))
    if unknown := [s for s in a.shapes if s not in modes.SHAPES] + [s for s in a.sweep if s not in modes.SWEEP]:
        parser.error(f"there is no shape {', '.join(unknown)}")
    return a


def main() -> int:
    a = parsed()
    a.out.mkdir(parents=True, exist_ok=True)
    run = Run(a.out, a.rounds, a.burst, time.monotonic() + a.seconds)
    torch.set_float32_matmul_precision("highest")
    run.say(f"{card()}   torch {torch.__version__}   triton {triton.__version__}   commit {ledger.commit()}")
    run.say(f"python {sys.version.split()[0]}   {os.cpu_count()} cores   {torch.cuda.mem_get_info()[1] / 1e9:.0f} GB")
    others = []
    for name in peers.PEERS if a.peers and a.shapes else ():
        if why := peers.missing(name):
            run.say(f"skip  {name}: {why}")
        else:
            others.append(name)
    lean = LEAN_MODES if "million" in a.sweep else []
    wanted = list(dict.fromkeys((a.full if a.shapes else []) + (a.few if a.sweep else []) + lean + others))
    try:
        good = check_all(run, wanted) if a.check else wanted
        for s in a.shapes:
            shape = modes.Shape(*modes.SHAPES[s], k=a.k, n=a.n)
            measure(run, shape, [name for name in a.full + others if name in good])
        run.rounds = min(a.rounds, SWEEP_ROUNDS)
        for s in a.sweep:
            names = LEAN_MODES if s == "million" else a.few
            measure(run, modes.SWEEP[s], [name for name in names if name in good], lean=s == "million")
    except Stop as stop:
        run.say(f"STOP  {stop}")
    run.say(f"\n{len(run.red)} RED: {', '.join(run.red)}" if run.red else "\nnothing is RED")
    return 1 if run.red else 0


if __name__ == "__main__":
    sys.exit(main())
