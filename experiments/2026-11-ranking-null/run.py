"""How often does a ranking cry wolf, and how often does it see?

    python experiments/2026-11-ranking-null/run.py [--rankings 200] [--kinds strong] [--out FOLDER]

Every ranking is the one that `rank` makes on its train split: 2000 latents over 480 examples in 24 blocks (a template
in a domain) of 20. Latents fire on 1 to 90 % of the examples, in bouts: a block's mood moves both how often a latent
fires and how often the label is there, and neighbouring latents fire together. Labels are drawn anew within blocks for
each ranking, so given the block they have nothing to do with any latent.

    null        those labels
    planted     one latent, of 30 % firing rate without the label, fires on a further share of the examples with it;
                its activations are of one size either way
    confound    the label also depends on an example's length, and so do 40 latents; with and without length given
    strong      300 latents over 80, 200 or 600 examples in one block rise, fall, peak or turn with a covariate that all
                but says the label: of log-odds 4 x (steep), or 4 (|x| - 0.7) (bowl). Given as a straight line, or as
                splines, which is what `rank` does; one more latent goes with the label alone

Writes null.csv, a row for each kind, and prints it. false_max_t: rankings in which a latent without an effect has p
(max-T) <= 0.05 (of the confound: one of those that track length). found_max_t: in which the planted one has. fdr: mean
share of latents without an effect among those with q (BH) <= 0.05. Intervals are Wilson's, 95 %.
"""

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from scipy.stats import binomtest

from sae_persona.attribution.association import aurocs
from sae_persona.attribution.midranks import SortedColumns
from sae_persona.attribution.null import Null, permutation_null, rank_statistics
from sae_persona.attribution.partial import Residuals, partial_statistics
from sae_persona.attribution.splines import room_for_knots, splines

N_LATENTS, N_BLOCKS, SIZE, PERMUTATIONS, PLANTED = 2000, 24, 20, 499, 7
TRACKING = slice(100, 140)
"""Latents that depend on length."""
BLOCKS = np.repeat(np.arange(N_BLOCKS), SIZE)
M = len(BLOCKS)


@dataclass(frozen=True)
class Kind:
    """What is simulated, and what is asked of the ranking.

    effect   share of the examples with the label on which the planted latent fires beyond the usual 30 %
    confound length moves label and some latents
    given    length is controlled for: "line" or "splines"
    by       rank or activation
    strong   "steep" or "bowl": how a strong confound says the label
    m        examples
    """

    name: str
    effect: float = 0.0
    confound: bool = False
    given: str = ""
    by: str = "rank"
    strong: str = ""
    m: int = M


KINDS = (
    Kind("null, by rank"),
    Kind("null, by activation", by="activation"),
    Kind("null, by rank, a covariate given", given="splines"),
    Kind("confound, not given", confound=True),
    Kind("confound, given", confound=True, given="splines"),
    Kind("planted, +20 % of examples", effect=0.2),
    Kind("planted, +30 % of examples", effect=0.3),
    Kind("planted, +35 % of examples", effect=0.35),
    Kind("planted, +35 % of examples, a covariate given", effect=0.35, given="splines"),
    *(
        Kind(f"strong {shape} confound, {m} examples, {given} given", strong=shape, given=given, m=m)
        for shape in ("steep", "bowl")
        for m in (80, 200, 600)
        for given in ("line", "splines")
    ),
)


def simulated(kind: Kind, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations [M, N_LATENTS], labels [M] bool, length [M, 1]."""
    rng = np.random.default_rng([seed, 17])
    mood = rng.normal(size=N_BLOCKS)[BLOCKS]
    length = rng.gamma(4.0, 10.0, M)
    long = (length - 40) / 20
    pull = 0.8 * mood + (1.2 * long if kind.confound else 0)
    y = rng.random(M) < 1 / (1 + np.exp(-pull))
    rates = np.exp(rng.uniform(np.log(0.01), np.log(0.9), N_LATENTS))
    rates[PLANTED] = 0.3
    shared = rng.normal(size=(M, N_LATENTS // 10)).repeat(10, axis=1)  # ten neighbours have half of it in common
    drive = 0.7 * shared + 0.7 * rng.normal(size=(M, N_LATENTS)) + 0.5 * mood[:, None] * rng.normal(size=N_LATENTS)
    if kind.confound:
        drive[:, TRACKING] += long[:, None]
    threshold = np.sort(drive, axis=0)[(M * (1 - rates)).astype(int).clip(max=M - 1), np.arange(N_LATENTS)]
    acts = np.where(drive >= threshold, drive - threshold + 0.1, 0)
    more = y & (rng.random(M) < kind.effect / (1 - 0.3)) & (acts[:, PLANTED] == 0)
    acts[more, PLANTED] = rng.exponential(0.7, more.sum()) + 0.1
    return acts.astype(np.float32), y, length[:, None]


def strongly_confounded(kind: Kind, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations [m, 300], labels [m] bool, the covariate [m, 1]."""
    rng, n_latents = np.random.default_rng([seed, kind.m, 23]), 300
    x = rng.normal(size=(kind.m, 1))
    pull = 4 * x[:, 0] if kind.strong == "steep" else 4 * (np.abs(x[:, 0]) - 0.7)
    y = rng.random(kind.m) < 1 / (1 + np.exp(-pull))
    slope, kink, shape = rng.uniform(1, 4, n_latents), rng.uniform(-1.5, 1.5, n_latents), np.arange(n_latents) % 4
    kinds = [slope * (x - kink), slope * (kink - x), 2 * slope * np.exp(-2 * (x - kink) ** 2) - 1]
    drive = np.choose(shape, [*kinds, slope * (np.abs(x) - 1)]) + rng.normal(size=(kind.m, n_latents))
    drive[:, PLANTED] = rng.normal(size=kind.m) - 0.8 + (1.0 if kind.m < 600 else 0.6) * y
    return np.maximum(drive, 0).astype(np.float32), y, x


def ranked(kind: Kind, seed: int) -> tuple[Null, float]:
    """The train split's null, and the planted latent's AUROC."""
    acts, y, length = strongly_confounded(kind, seed) if kind.strong else simulated(kind, seed)
    blocks = np.zeros(kind.m, np.int64) if kind.strong else BLOCKS
    columns = SortedColumns.of(sparse.csr_matrix(acts))
    labels = torch.from_numpy(y)[:, None]
    if kind.given or kind.by == "activation":
        n_knots = room_for_knots(length, len(np.unique(blocks))) if kind.given == "splines" else 0
        residuals = Residuals(splines(length, n_knots) if kind.given else length[:, :0], blocks)
        value = columns.value if kind.by == "activation" else columns.doubled
        statistics = partial_statistics(columns, value, labels, ("simulated",), residuals)
    else:
        statistics = rank_statistics(columns, labels, blocks)
    (null,) = permutation_null(columns, statistics, blocks, permutations=PERMUTATIONS, seed=seed)
    return null, float(aurocs(columns, labels)[PLANTED, 0])


def row_of(kind: Kind, rankings: int) -> dict[str, object]:
    start = time.perf_counter()
    false = np.arange(300 if kind.strong else N_LATENTS) != PLANTED
    if kind.confound:  # what is false is asked of the latents that track length
        false = np.isin(np.arange(N_LATENTS), np.arange(N_LATENTS)[TRACKING])
    counts, means = {"false_max_t": 0, "found_max_t": 0}, {"fdr": 0.0, "single_p_below_5": 0.0, "planted_auroc": 0.0}
    for seed in range(rankings):
        null, auroc = ranked(kind, seed)
        counts["false_max_t"] += int((null.p_max_t[false] <= 0.05).any())
        counts["found_max_t"] += int(null.p_max_t[PLANTED] <= 0.05)
        discovered = null.q_bh <= 0.05
        means["fdr"] += (discovered & false).sum() / max(1, discovered.sum()) / rankings
        means["single_p_below_5"] += float((null.p[false] <= 0.05).mean()) / rankings
        means["planted_auroc"] += auroc / rankings
    row: dict[str, object] = {"kind": kind.name, "rankings": rankings}
    for name, count in counts.items():
        interval = binomtest(count, rankings).proportion_ci(method="wilson")
        row |= {name: count / rankings, f"{name}_low": round(interval.low, 4), f"{name}_high": round(interval.high, 4)}
    row |= {name: round(float(mean), 4) for name, mean in means.items()}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rankings", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--kinds", default="", help="only those whose name has this in it")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind in (kind for kind in KINDS if a.kinds in kind.name):
        rows.append(row_of(kind, a.rankings))
        print(*rows[-1].values(), sep="  ", flush=True)
    with (a.out / "null.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
