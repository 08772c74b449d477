"""Loss curves with Adam's moments in fp32 and in bf16 with stochastic rounding, from the same weights and batches.

    python -m experiments.bench.moments [--steps 2000] [--every 50] [--out experiments/bench]

Writes <out>/moments.csv: step, then the loss of each, mean over the steps since the line before. The SAE starts at
random rows; TopK, d_in 768, 24576 latents, k 32, batches of 8192 planted activations, learning rate 2e-4 with warm-up.
"""

import argparse
import csv
from pathlib import Path

import torch

from experiments.bench import planted
from sae_persona.sae.kernel_plan import KernelConfig
from sae_persona.sae.kernel_step import KernelStep
from sae_persona.sae.sparsity import TopK
from sae_persona.sae.step import Weights

D_IN, N_LATENTS, K, N, N_BATCHES = 768, 24576, 32, 8192, 96
LR, WARMUP = 2e-4, 100


def curve(moments: str, batches: list[torch.Tensor], steps: int, every: int) -> list[float]:
    rows = planted.atoms(N_LATENTS, D_IN, seed=5, device="cuda")
    weights = Weights(rows, rows.new_zeros(N_LATENTS), rows, rows.new_zeros(D_IN))
    config = KernelConfig(moments=moments)
    step = KernelStep(weights, TopK(K), config=config, k_aux=None, auxk_coef=1 / 32, dead_after=2_000_000)
    losses, means = [], []
    for i in range(steps):
        step(batches[i % len(batches)], LR * min(1, (i + 1) / WARMUP))
        losses.append(step.loss.clone())
        if len(losses) == every:
            means.append(torch.stack(losses).mean().item())
            losses.clear()
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    dictionary = planted.atoms(N_LATENTS, D_IN, seed=0, device="cuda")
    batches = [planted.batch(dictionary, N, seed=i) for i in range(N_BATCHES)]
    curves = {moments: curve(moments, batches, a.steps, a.every) for moments in ("fp32", "bf16")}
    with (a.out / "moments.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *curves])
        for i, losses in enumerate(zip(*curves.values(), strict=True)):
            writer.writerow([(i + 1) * a.every, *(f"{loss:.4f}" for loss in losses)])
            fp32, bf16 = losses
            print(f"step {(i + 1) * a.every:6}   fp32 {fp32:9.4f}   bf16 {bf16:9.4f}   ratio {bf16 / fp32:.5f}")


if __name__ == "__main__":
    main()
