"""Do the lab's persona latents cause what they go with, do gradients say so, and do other SAEs find them?

    python experiments/2026-11-causal-screen/run.py OUT

Trains three SAEs with the demo's settings (two seeds, two widths) into OUT, or goes on with those that are there; ranks
three personas on each; screens those of the first SAE at the token before the answer and over the answer; compares the
rankings. Writes results.json beside this file and prints the tables. About ten minutes on one core.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_persona.activations.lm import LM, load_lm
from sae_persona.activations.stream import StreamConfig
from sae_persona.attribution.baselines import dense_baselines, random_directions
from sae_persona.attribution.causal import ScreenConfig, screen
from sae_persona.attribution.contrasts import read_contrasts
from sae_persona.attribution.labels import select
from sae_persona.attribution.rank import RankConfig, rank
from sae_persona.attribution.ranking import Ranking
from sae_persona.attribution.screens import Screen
from sae_persona.attribution.stability import StabilityConfig, stability
from sae_persona.attribution.tables import to_json
from sae_persona.demo import DemoConfig
from sae_persona.features.measure import MeasureConfig, Measurement
from sae_persona.features.pooled import Pooled
from sae_persona.lab import corpora
from sae_persona.lab.contrasts import contrasts
from sae_persona.runs import Run, write_json
from sae_persona.stages.pipeline import measure_stage, open_sae
from sae_persona.stages.training import train_stage

PERSONAS = ("formal", "deceptive", "malicious")
POOLS = (("pre", "pre"), ("mean", "answer"))
"""What a ranking looks at, and where a screen sets latents."""
SAES: dict[str, dict[str, int]] = {
    "first": {},
    "other seed": {"seed": 1},
    "twice as wide": {"seed": 2, "n_latents": 1024},
}
PAIRS = 200
"""Contrast pairs of each split."""
TOP = 10


def trained(path: Path, lm: LM, changes: dict[str, int]) -> Run:
    """The run, made if it is not there."""
    if (path / "latents.h5").is_file():
        return Run.open(path)
    demo = DemoConfig()
    streaming = StreamConfig(context_size=256, tokens="answers", passes=demo.passes, hold_tokens=500_000)
    texts = list(corpora.corpus(demo.n_corpus))
    rows = [*corpora.labelled(demo.n_train, "train"), *corpora.labelled(demo.n_held_out, "held_out")]
    with Run.making(path) as run:
        train_stage(run, lm, demo.hook, texts, streaming=streaming, training=replace(demo.training, **changes))
        measure_stage(run, lm, rows, config=MeasureConfig(context_size=256, tokens="answers"))
    return run


def beside(pooled: Pooled, persona: str, pool: str, ranking: Ranking) -> dict[str, Any]:
    """Held-out AUROC of the best latent and of all that it has to beat."""
    parts = [select(pooled, persona, split) for split in ("train", "held_out")]
    x = pooled.dense["pre" if pool == "pre" else "mean"]
    groups = np.unique(pooled.template[parts[0].rows], return_inverse=True)[1].ravel()
    dense = dense_baselines(x, *parts, probe_c=None, permutations=1000, seed=0, groups=groups)
    best = max(ranking.rows, key=lambda row: abs(row.auroc.value - 0.5))
    return {
        "best latent": best.held_out_auroc.value if best.direction > 0 else 1 - best.held_out_auroc.value,
        **{base.name: base.held_out_auroc.value for base in dense},
        "chosen": [base.note for base in dense if base.note],
        "random directions": random_directions(x, *parts, seed=0),
        "random latents": ranking.random,
    }


def summary(found: Screen) -> dict[str, Any]:
    """The numbers that the README quotes."""
    best = found[:TOP]
    return {
        "verdicts": {verdict: sum(row.verdict == verdict for row in best) for verdict in {row.verdict for row in best}},
        "effect only": sum(row.verdict == "effect only" for row in found),
        "best": [[row.latent, *row.effect, row.p_random, row.verdict] for row in best[:3]],
        "agreement": {f"{a.estimate}, {a.split}": [*a.spearman, a.same_sign] for a in found.agreement},
        "controls": [len(found.random.latents), found.random.p95],
        "lead": found.base,
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    lm = load_lm("lab")
    runs = {name: trained(out / name.replace(" ", "-"), lm, changes) for name, changes in SAES.items()}
    saes = {name: open_sae(run, lm) for name, run in runs.items()}
    measured = {name: Measurement.load(run) for name, run in runs.items()}
    results: list[dict[str, Any]] = []
    for persona in PERSONAS:
        pairs = read_contrasts([row for part in corpora.SPLITS for row in contrasts(persona, PAIRS, part)])
        for pool, positions in POOLS:
            rankings = {n: rank(m.pooled, m.stats, persona, RankConfig(pool=pool)) for n, m in measured.items()}
            ranking, pooled = rankings["first"], measured["first"].pooled
            found = screen(lm, saes["first"], ranking, pairs, ScreenConfig(positions=positions))
            compared = stability(list(saes.values()), list(rankings.values()), StabilityConfig(), names=list(saes))
            baselines = beside(pooled, persona, pool, ranking)
            print(found, compared, baselines, "", sep="\n\n", flush=True)
            results.append(
                {"persona": persona, "pool": pool, "positions": positions, "baselines": baselines}
                | {"screen": summary(found), "stability": compared.to_json()["comparisons"]}
            )
    write_json(Path(__file__).with_name("results.json"), to_json(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
