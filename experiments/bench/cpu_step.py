"""One TopK training step on the CPU beside SAELens' own, interleaved, on the same weights and batches.

    python -m experiments.bench.cpu_step [--rounds 15] [--threads 2] [--d-in 512] [--n-latents 8192] [--k 32]
        [--batch 1024]

Ours is `PlainStep.__call__`, with the count of dead latents, projection and renormalisation. Theirs is
`TopKTrainingSAE.training_forward_pass`, backward, gradient clipping and Adam, as in `SAETrainer._train_step`; its
firing statistics are left out, in its favour. No latent is dead, so neither has an AuxK loss. First both must compute
the same loss and the same gradients. Appends one row to results.csv.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from experiments.bench import ledger
from experiments.bench.peers import saelens
from sae_persona.sae.plain_step import PlainStep
from sae_persona.sae.sparsity import TopK
from sae_persona.sae.step import Weights

RESULTS = Path(__file__).with_name("results.csv")
LR = 1e-4


def ours(weights: Weights, k: int) -> PlainStep:
    return PlainStep(Weights(*(w.clone() for w in weights)), TopK(k), k_aux=None, auxk_coef=1 / 32, dead_after=10**9)


def planted(d_in: int, n_latents: int, k: int, batch: int, seed: int) -> tuple[Weights, list[Tensor]]:
    """A unit dictionary, and batches that are sparse sums of its atoms with noise."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(n_latents, d_in, generator=generator), dim=1)
    batches = []
    for _ in range(4):
        idx = torch.randint(n_latents, (batch, k), generator=generator)
        sizes = torch.rand(batch, k, generator=generator) + 0.5
        noise = 0.1 * torch.randn(batch, d_in, generator=generator)
        batches.append(torch.nn.functional.embedding_bag(idx, atoms, mode="sum", per_sample_weights=sizes) + noise)
    return Weights(atoms.clone(), torch.zeros(n_latents), atoms, torch.zeros(d_in)), batches


def check(weights: Weights, x: Tensor, k: int) -> None:
    """Both compute one loss and one encoder gradient. RuntimeError if not."""
    mine = ours(weights, k)
    loss = mine.gradients(x).measures()["loss"]
    sae, _ = saelens(weights, k, lr=LR)
    output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    output.loss.backward()
    assert sae.W_enc.grad is not None and mine.weights.w_enc.grad is not None
    off = (sae.W_enc.grad.T - mine.weights.w_enc.grad).norm() / sae.W_enc.grad.norm()
    if abs(loss - output.loss.item()) > 1e-5 * loss or off > 1e-4:
        raise RuntimeError(
            f"not the same step: loss {loss} and {output.loss.item()}, encoder gradients {off:.1e} apart"
        )


def measure(steps: dict[str, Callable[[Tensor], object]], batches: list[Tensor], rounds: int) -> dict[str, Tensor]:
    """Milliseconds of each step in each round, the order turning round by round; two rounds first that do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(-2, rounds):
        x = batches[i % len(batches)]
        for name in sorted(steps, reverse=bool(i % 2)):
            start = time.perf_counter()
            steps[name](x)
            if i >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: torch.tensor(ms) for name, ms in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("rounds", 15),
        ("threads", 2),
        ("d-in", 512),
        ("n-latents", 8192),
        ("k", 32),
        ("batch", 1024),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    load = round(os.getloadavg()[0], 1)
    weights, batches = planted(a.d_in, a.n_latents, a.k, a.batch, seed=0)
    check(weights, batches[0], a.k)
    mine, (_, theirs) = ours(weights, a.k), saelens(weights, a.k, lr=LR)
    ms = measure({"ours": lambda x: mine(x, LR).measures()["loss"], "sae_lens": theirs}, batches, max(10, a.rounds))

    row: dict[str, object] = {
        "commit": ledger.commit(),
        "date": date.today().isoformat(),
        "machine": platform.machine(),
    }
    row |= {
        "cores": os.cpu_count(),
        "load": load,
        "threads": a.threads,
        "torch": torch.__version__,
        "op": "cpu_step topk",
    }
    row["shape"] = f"d_in={a.d_in} n_latents={a.n_latents} k={a.k} batch={a.batch}"
    for name, values in ms.items():
        for q in (20, 50, 80):
            row[f"{name}_ms_p{q}"] = round(values.quantile(q / 100).item(), 1)
    row["ratio"] = round((ms["sae_lens"].median() / ms["ours"].median()).item(), 2)
    row["rounds"] = max(10, a.rounds)
    ledger.append(RESULTS, row)
    for name, value in row.items():
        print(f"{name:16} {value}")


if __name__ == "__main__":
    main()
