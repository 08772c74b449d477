"""Do the lab's persona latents cause what they go with, and do gradients say so?

    python experiments/2026-11-causal-screen/run.py OUT

Trains an SAE with the demo's settings into OUT/run (or goes on with the one that is there), ranks three personas, and
screens each at the token before the answer and over the answer. Writes OUT/results.json and prints the tables.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from sae_persona.activations.lm import LM, load_lm
from sae_persona.activations.stream import StreamConfig
from sae_persona.attribution.causal import ScreenConfig, screen
from sae_persona.attribution.contrasts import read_contrasts
from sae_persona.attribution.rank import RankConfig, rank
from sae_persona.attribution.screens import Screen
from sae_persona.attribution.tables import to_json
from sae_persona.demo import DemoConfig
from sae_persona.features.measure import MeasureConfig, Measurement
from sae_persona.lab import corpora
from sae_persona.lab.contrasts import contrasts
from sae_persona.pipeline import measure_stage, open_sae
from sae_persona.runs import Run, write_json
from sae_persona.training import train_stage

PERSONAS = ("formal", "deceptive", "malicious")
PAIRS = 200
"""Contrast pairs of each split."""
TOP = 10


def trained(path: Path, lm: LM) -> Run:
    """The run, made if it is not there."""
    if (path / "latents.h5").is_file():
        return Run.open(path)
    demo = DemoConfig()
    streaming = StreamConfig(context_size=256, tokens="answers", passes=demo.passes, hold_tokens=500_000)
    texts = list(corpora.corpus(demo.n_corpus))
    rows = [*corpora.labelled(demo.n_train, "train"), *corpora.labelled(demo.n_held_out, "held_out")]
    with Run.making(path) as run:
        train_stage(run, lm, demo.hook, texts, streaming=streaming, training=demo.training)
        measure_stage(run, lm, rows, config=MeasureConfig(context_size=256, tokens="answers"))
    return run


def summary(found: Screen) -> dict[str, Any]:
    """The numbers that the README quotes."""
    best = found[:TOP]
    return {
        "persona": found.persona,
        "positions": found.config["positions"],
        "verdicts": [row.verdict for row in best],
        "causal": sum(row.verdict == "causal" for row in best),
        "agreement": {f"{a.estimate}, {a.split}": [*a.spearman, a.same_sign] for a in found.agreement},
        "largest": min(row.effect.value for row in found),
        "random p95": found.random.p95,
        "base": found.base.value,
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    lm = load_lm("lab")
    run = trained(out / "run", lm)
    sae, measured = open_sae(run, lm), Measurement.load(run)
    results: list[dict[str, Any]] = []
    for persona in PERSONAS:
        pairs = read_contrasts([row for part in corpora.SPLITS for row in contrasts(persona, PAIRS, part)])
        for pool, positions in (("pre", "pre"), ("mean", "answer")):
            ranking = rank(measured.pooled, measured.stats, persona, RankConfig(pool=pool))
            found = screen(lm, sae, ranking, pairs, ScreenConfig(positions=positions))
            print(ranking.table(TOP), found, "", sep="\n\n", flush=True)
            results.append(
                {"summary": to_json(summary(found)), "ranking": ranking.to_json(), "screen": found.to_json()}
            )
    write_json(out / "results.json", results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
