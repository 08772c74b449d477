"""Rankings of all latents for all personas under all permutations, beside a loop of scikit-learn's AUROC.

    python -m experiments.bench.attribution --size small|cpu|gpu [--device cpu] [--given 0] [--loop 300] [--threads 2]

Activations are drawn with ties and uneven firing rates (the most frequent latents fire on every example), labels at
random within 50 templates. First both must give the same AUROCs. Timed are the transfer, the sort, midranks, exact
moments, AUROCs of every latent for every persona, and own, max-T and pooled counts over every permutation; --given
covariates, as splines, make them partial correlations. Not timed: drawing the data, and the compilation of the kernel,
by a small case first. The loop calls roc_auc_score for --loop pairs of a latent and a labelling; what it would take for
all pairs is extrapolated: for the AUROCs seen, and for those of every permutation too. Adds a row to attribution.csv.
"""

import argparse
import os
import platform
import resource
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from sklearn.metrics import roc_auc_score

from experiments.bench import ledger
from sae_persona.attribution.association import aurocs
from sae_persona.attribution.midranks import SortedColumns
from sae_persona.attribution.null import permutation_null, rank_statistics
from sae_persona.attribution.partial import Residuals, partial_statistics
from sae_persona.attribution.splines import room_for_knots, splines

RESULTS = Path(__file__).with_name("attribution.csv")
SIZES = {  # latents, examples, non-zeros an example, personas, permutations
    "small": (1024, 400, 125, 2, 200),
    "cpu": (16384, 2000, 2000, 8, 1000),
    "gpu": (131072, 10000, 2000, 32, 1000),
}
TEMPLATES = 50


def drawn(n_latents: int, m: int, nnz: int, personas: int, seed: int = 0) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Activations [m, n_latents] fp32, one non-zero in each of ``nnz`` strata that widen, and labels [m, personas]."""
    generator = np.random.default_rng(seed)
    edges = np.arange(nnz + 1) + np.floor((n_latents - nnz) * np.linspace(0, 1, nnz + 1) ** 2).astype(np.int64)
    indices = (edges[:-1] + generator.random((m, nnz), np.float32) * np.diff(edges)).astype(np.int32)
    indices = np.minimum(indices, edges[1:] - 1).astype(np.int32)
    values = np.ceil(generator.standard_exponential((m, nnz), np.float32) * 64) / 64
    matrix = sparse.csr_matrix((values.ravel(), indices.ravel(), np.arange(m + 1) * nnz), shape=(m, n_latents))
    return matrix, generator.random((m, personas)) < np.linspace(0.1, 0.6, personas)


def engine(
    matrix: sparse.csr_matrix, y: np.ndarray, blocks: np.ndarray, permutations: int, given: int, device: str
) -> tuple[np.ndarray, dict[str, float]]:
    """AUROCs [n_latents, personas], and seconds until each part was there."""
    marks, start = {}, time.perf_counter()

    def mark(name: str) -> None:
        if device != "cpu":
            torch.cuda.synchronize()
        marks[name] = time.perf_counter() - start

    columns = SortedColumns.of(matrix, device)
    columns.doubled  # noqa: B018
    mark("midranks_s")
    labels = torch.from_numpy(y).to(device)
    found = aurocs(columns, labels).cpu().numpy()
    mark("aurocs_s")
    if given:
        known = np.random.default_rng(1).normal(size=(len(y), given))
        known = splines(known, room_for_knots(known, len(np.unique(blocks))))
        names = [str(i) for i in range(y.shape[1])]
        statistics = partial_statistics(columns, columns.doubled, labels, names, Residuals(known, blocks, device))
    else:
        statistics = rank_statistics(columns, labels, blocks)
    mark("statistics_s")
    nulls = permutation_null(columns, statistics, blocks, permutations=permutations, seed=0)
    mark("all_s")
    smallest = min(null.p_max_t.min() for null in nulls)
    print(f"smallest p (max-T) of {y.shape[1]} personas without an effect: {smallest:.3f}")
    return found, marks


def loop(matrix: sparse.csr_matrix, y: np.ndarray, found: np.ndarray, calls: int) -> float:
    """Seconds of one call of scikit-learn's, whose answers must be ours."""
    columns = sparse.csc_matrix(matrix)
    pairs = np.random.default_rng(2).integers(0, found.shape, (calls, 2))
    dense = [np.asarray(columns[:, [i]].todense()).ravel() for i, _ in pairs]
    start = time.perf_counter()
    theirs = [roc_auc_score(y[:, p], column) for (_, p), column in zip(pairs, dense, strict=True)]
    seconds = (time.perf_counter() - start) / calls
    off = np.abs(np.array(theirs) - found[pairs[:, 0], pairs[:, 1]]).max()
    if off > 1e-12:
        raise RuntimeError(f"not the same AUROCs: {off:.1e} apart")
    return seconds


def peak_gb(device: str) -> float:
    """Of the card's memory, or of this process's resident memory, which holds the libraries and the data too."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--given", type=int, default=0)
    parser.add_argument("--loop", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    load = round(os.getloadavg()[0], 1)
    n_latents, m, nnz, personas, permutations = SIZES[a.size]
    small, some = drawn(512, 200, 64, 2)
    engine(small, some, np.arange(200) % 5, permutations, a.given, a.device)
    if a.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    matrix, y = drawn(n_latents, m, nnz, personas)
    found, marks = engine(matrix, y, np.arange(m) % TEMPLATES, permutations, a.given, a.device)
    memory, one = peak_gb(a.device), loop(matrix, y, found, a.loop)
    pairs = n_latents * personas
    row: dict[str, object] = {"commit": ledger.commit(), "date": date.today().isoformat()}
    row["machine"] = platform.machine() if a.device == "cpu" else torch.cuda.get_device_name()
    row |= {"cores": os.cpu_count(), "load": load, "threads": a.threads, "torch": torch.__version__}
    row["shape"] = f"latents={n_latents} examples={m} nnz={nnz} personas={personas} permutations={permutations}"
    row |= {"given": a.given, **{name: round(seconds, 3) for name, seconds in marks.items()}}
    row |= {"peak_gb": round(memory, 2), "sklearn_call_ms": round(1e3 * one, 3), "sklearn_calls": a.loop}
    row["ratio_aurocs"] = round(one * pairs / marks["aurocs_s"])
    row["ratio_all"] = round(one * pairs * (1 + permutations) / marks["all_s"])
    ledger.append(RESULTS, row)
    for name, value in row.items():
        print(f"{name:16} {value}")


if __name__ == "__main__":
    main()
