"""Are our SAEs as good as SAELens' at equal data, width and L0? FVU and cross entropy recovered, on two models.

    python experiments/2026-11-saelens-quality/run.py [--model FOLDER] [--data FOLDER] [--only lab|craftgpt]
        [--rules topk batch_topk jumprelu] [--quick]

Activations are harvested once by our stream and held in memory. Both sides get the same batches in the same order, as
many steps and the best of their learning rates. Writes NAME.json for each model.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from sides import RULES, SIDES, Side, Spec, at_l0, l0, missed, trained
from summary import interval
from torch import Tensor

from sae_persona.activations.lm import LM, load_lm
from sae_persona.activations.stream import StreamConfig, stream
from sae_persona.errors import DataError, SaePersonaError
from sae_persona.lab import corpora
from sae_persona.runs import read_json, write_json
from sae_persona.sae.quality import quality
from sae_persona.sae.train import RuleName
from sae_persona.types import HookPoint

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared"
SEEDS = (0, 1, 2)
DEVELOPMENT_SEED = 100
LRS = (4e-3, 8e-3, 1.6e-2)
MEASURES = ("fvu", "ce_recovered", "kl_spliced", "dead")
BATCH = 512


@dataclass(frozen=True, kw_only=True)
class World:
    """A model with its texts, and the size of the SAEs that are trained on it."""

    name: str
    lm: LM
    hook: HookPoint
    train: list[Any]
    development: list[Any]
    test: list[Any]
    context_size: int
    n_latents: int
    k: int
    steps: int
    tanh: tuple[tuple[float, float], ...]
    """Learning rates and weights of the tanh loss that are tried for SAELens' JumpReLU: found by hand, near an L0 of k.

    The learning rate decides how far the thresholds get in so few steps, and so the L0 more than the weight does.
    """


def lab() -> World:
    """The embedded model and dialogues of its planted world; the held-out ones have another seed."""
    return World(
        name="lab",
        lm=load_lm("lab"),
        hook=HookPoint(3),
        train=list(corpora.corpus(2500)),
        development=list(corpora.corpus(80, seed=1)),
        test=list(corpora.corpus(40, seed=2)),
        context_size=256,
        n_latents=512,
        k=8,
        steps=500,
        tanh=((4e-3, 0.1), (4e-3, 0.07), (6e-3, 0.03), (3e-3, 0.5)),
    )


def craftgpt(model: Path, data: Path) -> World:
    """The chat model and dialogues sampled from it; no first question is in two parts."""
    path = data / "dialogs.txt"
    if not path.is_file():
        raise DataError(f"there is no {path}: --data must hold dialogs.txt, a dialogue a line")
    lines = sorted({line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()})
    questions = sorted({_question(line) for line in lines})
    random.Random(0).shuffle(questions)
    n_test, n_development = len(questions) // 10, len(questions) // 5
    part = {
        q: "test" if i < n_test else "development" if i < n_development else "train" for i, q in enumerate(questions)
    }
    random.Random(1).shuffle(lines)
    parts: dict[str, list[Any]] = {"train": [], "development": [], "test": []}
    for line in lines:
        parts[part[_question(line)]].append(line)
    return World(
        name="craftgpt",
        lm=load_lm(str(model)),
        hook=HookPoint(4),
        train=parts["train"],
        development=parts["development"][:140],
        test=parts["test"][:80],
        context_size=64,
        n_latents=512,
        k=16,
        steps=500,
        tanh=((2e-3, 1.0), (2e-3, 1.5), (2e-3, 2.0), (3e-3, 0.7)),
    )


def _question(dialogue: str) -> str:
    return dialogue.partition("[/inst]")[0]


def harvest(world: World) -> tuple[list[Tensor], Tensor]:
    """Batches to train on, each once, and development activations [n, d_in]."""
    config = StreamConfig(context_size=world.context_size, batch_tokens=BATCH, lm_batch=64)
    batches: list[Tensor] = []
    for batch in stream(world.lm, world.hook, world.train, config):
        batches.append(batch)
        if len(batches) == world.steps:
            break
    else:
        raise DataError(f"the texts of {world.name} give {len(batches)} batches of {world.steps}: give more texts")
    return batches, torch.cat(list(stream(world.lm, world.hook, world.development, config)))


def choose(
    batches: Sequence[Tensor], development: Tensor, spec: Spec, tanh: Sequence[tuple[float, float]]
) -> dict[Side, dict[str, Any]]:
    """Each side's settings of least development FVU at equal L0; and all that was tried.

    On half of the batches, but for JumpReLU: how sparse SAELens' becomes depends on the number of steps.
    """
    some = batches if spec.rule == "jumprelu" else batches[: len(batches) // 2]
    chosen: dict[Side, dict[str, Any]] = {}
    for side in SIDES:
        grid = [{"lr": lr, "l0_coef": None} for lr in LRS]
        if side == "sae_lens" and spec.rule == "jumprelu":
            grid = [{"lr": lr, "l0_coef": coef} for lr, coef in tanh]
        tried = []
        for settings in grid:
            sae, _ = trained(side, some, replace(spec, seed=DEVELOPMENT_SEED, **settings))
            fvu = missed(at_l0(sae, development, spec.k), development)
            tried.append({**settings, "l0_exported": l0(sae, development), "fvu": fvu})
            say(f"  {spec.rule} {side} {settings}: development FVU {fvu:.4f}")
        best = min(tried, key=lambda one: one["fvu"])
        chosen[side] = {"lr": best["lr"], "l0_coef": best["l0_coef"], "tried": tried}
    return chosen


def compare(
    world: World, batches: Sequence[Tensor], development: Tensor, rule: RuleName, seeds: Sequence[int]
) -> dict[str, Any]:
    """Train both sides on every seed and measure them on the test texts at the L0 of k."""
    spec = Spec(rule=rule, n_latents=world.n_latents, k=world.k, lr=0, seed=0)
    chosen = choose(batches, development, spec, world.tanh)
    rows = []
    for seed, side in product(seeds, SIDES):
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
        spec = replace(spec, lr=chosen[side]["lr"], l0_coef=chosen[side]["l0_coef"], seed=seed)
        sae, seconds = trained(side, [batches[i] for i in order], spec)
        equal = at_l0(sae, development, world.k)
        found = asdict(quality(world.lm, world.hook, equal, world.test, context_size=world.context_size, lm_batch=64))
        rows.append({"seed": seed, "side": side, "seconds": seconds, "l0_exported": l0(sae, development), **found})
        say(f"  {rule} {side} seed {seed}: FVU {found['fvu']:.4f}, CE recovered {found['ce_recovered']:.4f}")
    return {"chosen": chosen, "rows": rows, "ours - sae_lens": differences(rows, MEASURES)}


def differences(rows: Sequence[dict[str, Any]], measures: Sequence[str]) -> dict[str, list[float]]:
    """Ours minus theirs, paired over seeds: mean, and the ends of its 95 % interval."""
    by_side = {side: [row for row in rows if row["side"] == side] for side in SIDES}
    return {
        measure: interval([a[measure] - b[measure] for a, b in zip(by_side["ours"], by_side["sae_lens"], strict=True)])
        for measure in measures
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Compare on each model, and write its file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "craftgpt-5m", help="CraftGPT's folder")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "craftgpt-dialogues", help="of dialogs.txt")
    parser.add_argument("--only", choices=("lab", "craftgpt"))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES, help="what is known of others is kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="40 steps and two seeds, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers = {"lab": lab, "craftgpt": partial(craftgpt, args.model, args.data)}
    for name in [args.only] if args.only else makers:
        start = time.perf_counter()
        try:
            world = makers[name]()
            world = replace(world, steps=40) if args.quick else world
            batches, development = harvest(world)
        except SaePersonaError as error:
            raise SystemExit(f"{error}") from error
        say(f"{name}: {len(batches)} batches of {BATCH}, {len(development)} development activations")
        path = args.out / f"{name}.json"
        known = read_json(path, "results")["rules"] if path.exists() and len(args.rules) < len(RULES) else {}
        results: dict[str, Any] = {
            "hook": str(world.hook),
            **{key: getattr(world, key) for key in ("n_latents", "k", "steps")},
            "batch": BATCH,
            "d_in": batches[0].shape[1],
            "rules": known,
        }
        for rule in args.rules:
            results["rules"][rule] = compare(world, batches, development, rule, SEEDS[:2] if args.quick else SEEDS)
            write_json(path, results)
        say(f"{name}: {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
