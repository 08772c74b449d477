"""How much of a known dictionary does each side find? Sparse sums of atoms with Zipf's frequencies, and noise.

    python experiments/2026-11-saelens-quality/dictionary.py [--quick]

An atom is recovered if a decoder direction has a cosine above 0.9 with it. Writes dictionary.json.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from run import DEVELOPMENT_SEED, HERE, SEEDS, choose, differences, say
from sides import SIDES, Spec, at_l0, l0, missed, trained
from torch import Tensor

from sae_persona.runs import write_json
from sae_persona.sae.model import SAE
from sae_persona.sae.train import RuleName

RECOVERED = 0.9
RULES: tuple[RuleName, ...] = ("topk", "batch_topk")
MEASURES = ("recovered", "weighted", "quarter_1", "quarter_2", "quarter_3", "quarter_4", "fvu", "dead")


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What the activations are made of. Atom i, from 1, fires with probability active * (i + 2)^-1 / their sum."""

    d_in: int = 128
    n_atoms: int = 512
    active: int = 8
    """Atoms a token, on average; independent of each other."""
    spread: float = 0.5
    """Of the logarithm of an atom's size, whose mean is 0."""
    noise: float = 0.05
    """Standard deviation of each coordinate's noise."""
    batch: int = 512
    steps: int = 500
    n_latents: int = 512

    @property
    def rates(self) -> Tensor:
        """How often each atom fires: [n_atoms]."""
        rates = 1 / (torch.arange(self.n_atoms) + 3.0)
        return rates * self.active / rates.sum()


def sample(planted: Planted, seed: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Unit atoms [n_atoms, d_in], batches to train on, and held-out activations [8 * batch, d_in]."""
    # never the seed of an SAE, whose first decoder would be these atoms
    generator = torch.Generator().manual_seed(10_000 + seed)
    atoms = torch.nn.functional.normalize(torch.randn(planted.n_atoms, planted.d_in, generator=generator), dim=1)
    batches = []
    for _ in range(planted.steps + 8):
        fires = torch.rand(planted.batch, planted.n_atoms, generator=generator) < planted.rates
        sizes = (planted.spread * torch.randn(planted.batch, planted.n_atoms, generator=generator)).exp() * fires
        noise = planted.noise * torch.randn(planted.batch, planted.d_in, generator=generator)
        batches.append(sizes @ atoms + noise)
    return atoms, batches[: planted.steps], torch.cat(batches[planted.steps :])


def recovery(sae: SAE, atoms: Tensor, rates: Tensor) -> dict[str, float]:
    """Share of the atoms recovered: of all, weighted by frequency, and of each quarter, the most frequent first."""
    found = ((atoms @ sae.w_dec.T).max(dim=1).values > RECOVERED).float()
    quarters = {f"quarter_{i}": part.mean().item() for i, part in enumerate(found.chunk(4), start=1)}
    return {"recovered": found.mean().item(), "weighted": (found @ rates / rates.sum()).item(), **quarters}


def dead(sae: SAE, x: Tensor) -> float:
    """Share of the latents that fire on none of the tokens x [n, d_in]."""
    latents = sae.encode(x)
    fired = latents.idx[latents.acts > 0].unique()
    return 1 - len(fired) / sae.n_latents


def compare(planted: Planted, rule: RuleName, seeds: Sequence[int]) -> dict[str, Any]:
    """Both sides on a new dictionary each seed; learning rates are chosen by FVU, since real atoms are not known."""
    spec = Spec(rule=rule, n_latents=planted.n_latents, k=planted.active, lr=0, seed=0)
    _, batches, held_out = sample(planted, DEVELOPMENT_SEED)
    chosen = choose(batches, held_out, spec, tanh=())
    rows = []
    for seed in seeds:
        atoms, batches, held_out = sample(planted, seed)
        for side in SIDES:
            sae, seconds = trained(side, batches, replace(spec, lr=chosen[side]["lr"], seed=seed))
            equal = at_l0(sae, held_out, spec.k)
            row = {"seed": seed, "side": side, "seconds": seconds, "l0_exported": l0(sae, held_out)}
            row |= recovery(equal, atoms, planted.rates)
            row |= {"l0": l0(equal, held_out), "fvu": missed(equal, held_out), "dead": dead(equal, held_out)}
            rows.append(row)
            say(f"  {rule} {side} seed {seed}: {row['recovered']:.3f} recovered, FVU {row['fvu']:.4f}")
    return {"chosen": chosen, "rows": rows, "ours - sae_lens": differences(rows, MEASURES)}


def main() -> None:
    """Compare under each rule, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="40 steps and two seeds, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    planted = Planted(steps=40) if args.quick else Planted()
    results: dict[str, Any] = {"planted": asdict(planted), "rules": {}}
    for rule in RULES:
        results["rules"][rule] = compare(planted, rule, SEEDS[:2] if args.quick else SEEDS)
        write_json(args.out / "dictionary.json", results)
    say(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
