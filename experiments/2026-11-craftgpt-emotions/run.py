"""Do latents of a real chat model carry happy and sad? Train, measure, rank, sweep, equal-cost controls, report.

python experiments/2026-11-craftgpt-emotions/run.py --model FOLDER --data FOLDER --out RUN
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from charts import draw
from dialogs import Corpus, labelled_rows, questions, read_corpus, unlabelled_rows
from equal_cost import Bench, against_random, equal_cost
from sklearn.metrics import roc_auc_score
from words import explained, judge, telling

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import LM, load_lm
from sae_persona.activations.stream import StreamConfig
from sae_persona.attribution.labels import select
from sae_persona.attribution.rank import RankConfig
from sae_persona.attribution.ranking import Ranking
from sae_persona.features.measure import MeasureConfig, Measurement
from sae_persona.features.pooled import Pool, Pooled
from sae_persona.report.page import write_report
from sae_persona.runs import Run, read_json, write_json
from sae_persona.sae.recipe import TrainConfig
from sae_persona.stages.pipeline import (
    candidates,
    chosen_clamp,
    export_stage,
    mean_difference,
    measure_stage,
    open_ranking,
    rank_stage,
    rates_at,
    sweep_stage,
)
from sae_persona.stages.training import open_model, open_sae, train_stage
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.apply import intervene
from sae_persona.steering.arms import Sweep
from sae_persona.steering.controls import matched_latents
from sae_persona.steering.export.native import load_intervention
from sae_persona.steering.interventions import Clamp, Steer
from sae_persona.steering.positions import Positions
from sae_persona.steering.strength import wilson
from sae_persona.steering.sweep import SweepConfig
from sae_persona.types import HookPoint

HERE = Path(__file__).parent
PERSONAS = ("happy", "sad")
CONTEXT = 64


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that was chosen, on train dialogues and development questions."""

    layer: int = 4
    n_latents: int = 1024
    k: int = 16
    steps: int = 900
    pool: Pool = "pre"
    positions: Positions = "all"
    strengths: tuple[float, ...] = (0.75, 1.0, 1.25, 1.5, 2.0)
    max_cost: float = 1.6
    slack: float = 0.02
    n_candidates: int = 3
    n_development: int = 256
    n_test: int = 320
    skip_test: int = 320
    """Test questions that were looked at while this was written; none of them is asked again."""
    n_random: int = 100
    max_new_tokens: int = 20

    def test(self, corpus: Corpus) -> list[list[dict[str, str]]]:
        """The test questions."""
        return questions(corpus.texts["test"], self.skip_test + self.n_test)[self.skip_test :]

    @property
    def answers(self) -> AnswerConfig:
        return AnswerConfig(max_new_tokens=self.max_new_tokens, batch=512)


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=Settings.layer)
    parser.add_argument("--n-random", type=int, default=Settings.n_random)
    parser.add_argument("--force", action="store_true", help="replace the run that is at --out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    settings = Settings(layer=args.layer, n_random=args.n_random)
    lm, corpus = load_lm(str(args.model)), read_corpus(args.data)
    with Run.making(args.out, force=args.force) as run:
        found = train_and_measure(run, lm, corpus, settings)
        for persona in PERSONAS:
            rank_and_sweep(run, lm, persona, corpus, found, settings)
        controls = control_all(run, corpus, settings)
    results = {
        "settings": asdict(settings),
        "data": facts_of(corpus, found),
        "sae": read_json(run.quality, "quality"),
        "personas": {persona: {"ranking": ranked(run, found, persona), **controls[persona]} for persona in PERSONAS},
    }
    arms = {persona: controls[persona]["random"].pop("arms") for persona in PERSONAS}
    write_json(run.path / "equal_cost.json", arms)
    results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    write_json(HERE / "results.json", results)
    draw(results, arms, HERE / "equal_cost.png")
    print(write_report(run))


def train_and_measure(run: Run, lm: LM, corpus: Corpus, settings: Settings) -> Measurement:
    """An SAE on the answers of the train dialogues, and its latents on every labelled answer."""
    train_stage(
        run,
        lm,
        HookPoint(settings.layer),
        unlabelled_rows(corpus.texts["train"]),
        streaming=StreamConfig(context_size=CONTEXT, tokens="answers", passes=4, lm_batch=64),
        training=TrainConfig(n_latents=settings.n_latents, k=settings.k, lr=1e-3, steps=settings.steps),
        held_out=unlabelled_rows(corpus.texts["held_out"][:400]),
    )
    rows = labelled_rows(corpus, PERSONAS)
    return measure_stage(run, lm, rows, config=MeasureConfig(context_size=CONTEXT, tokens="answers", lm_batch=64))


def rank_and_sweep(run: Run, lm: LM, persona: str, corpus: Corpus, found: Measurement, settings: Settings) -> None:
    """Rank, choose latent and strength on development questions, measure on test questions, export."""
    ranking = rank_stage(run, persona, config=RankConfig(pool=settings.pool), found=found)
    print(ranking)
    swept = sweep_stage(
        run,
        lm,
        persona,
        development=questions(corpus.texts["development"], settings.n_development),
        test=settings.test(corpus),
        judge=judge,
        config=SweepConfig(
            strengths=settings.strengths,
            positions=settings.positions,
            max_cost=settings.max_cost,
            slack=settings.slack,
            answers=settings.answers,
        ),
        n_candidates=settings.n_candidates,
        found=found,
    )
    print(swept)
    export_stage(run, lm, persona, [chosen_clamp(swept)], positions=settings.positions)
    check_export(run, lm, persona, swept, settings.test(corpus)[:8], settings)


def check_export(run: Run, lm: LM, persona: str, swept: Sweep, chats: Sequence[Any], settings: Settings) -> None:
    """The clamp must write the same greedy answers from its file alone as with the run's SAE."""
    greedy, prompts = AnswerConfig(temperature=0.0, max_new_tokens=20), [prompt_tokens(lm, chat) for chat in chats]
    with load_intervention(run.intervention(persona)).applied(lm):
        alone = answer(lm, prompts, greedy)
    with intervene(lm, open_sae(run, lm), [chosen_clamp(swept)], positions=settings.positions):
        together = answer(lm, prompts, greedy)
    if [a.ids for a in alone] != [a.ids for a in together]:
        raise SystemExit(f"{run.intervention(persona)} does not do what it was exported from")


def control_all(run: Run, corpus: Corpus, settings: Settings) -> dict[str, dict[str, Any]]:
    """The controls of every persona, a process each."""
    with get_context("spawn").Pool(len(PERSONAS)) as pool:
        found = pool.map(partial(control, run.path, settings.test(corpus), settings), PERSONAS)
        pool.close()
        pool.join()
    return dict(zip(PERSONAS, found, strict=True))


def control(path: Path, chats: list[Any], settings: Settings, persona: str) -> dict[str, Any]:
    """The chosen clamp on the test questions beside everything that it has to beat, at the same cost."""
    torch.set_num_threads(1)
    run = Run.open(path)
    lm, found, swept = open_model(run), Measurement.load(run), Sweep.load(run.sweep(persona))
    sae, clamp = open_sae(run, lm), chosen_clamp(swept)
    held = Bench(lm, judge, settings.answers, chats)

    def clamping(latent: int, value: float):
        return intervene(lm, sae, [Clamp(latent, 1.0, value)], positions=settings.positions)

    def adding(pool: Pool, strength: float):
        steer = Steer(mean_difference(found.pooled, persona, pool), strength)
        return intervene(lm, None, [steer], hook=sae.hook, positions=settings.positions)

    ours = partial(clamping, clamp.latent, clamp.strength * clamp.unit)
    chosen = held.outcome(ours())
    base = {name: [round(x, 4) for x in wilson(score)] for name, score in held.baseline.scores.items()}
    arms = {"latent": {"latent": clamp.latent, "strength": clamp.strength, **held.facts(chosen, persona)}}
    for pool in ("pre", "mean"):
        steering = partial(adding, pool)
        strength, outcome = equal_cost(held, steering, target=held.log_cost(chosen), start=1.0)
        arms[f"difference of means, {pool}"] = {"strength": round(strength, 3), **held.facts(outcome, persona)}
    arms["told in the question"] = held.facts(held.outcome(nullcontext(), told(lm, chats, persona)), persona)
    tried = {row.latent for row in candidates(open_ranking(run, persona), settings.n_candidates)}
    rates = rates_at(found, settings.positions)
    randoms = matched_latents(rates, tried, clamp.latent, settings.n_random, seed=0)
    others = {latent: partial(clamping, latent) for latent in randoms}
    random = against_random(held, persona, chosen, others, start=clamp.strength * clamp.unit)
    return {"baseline": base, "arms": arms, "random": random}


def told(lm: LM, chats: Sequence[Any], persona: str) -> list[list[int]]:
    """Prompts in which the user brings the persona up: the template takes no system message."""
    said = f"i feel very {persona} today. "
    return [prompt_tokens(lm, [{"role": "user", "content": said + chat[-1]["content"]}]) for chat in chats]


def facts_of(corpus: Corpus, found: Measurement) -> dict[str, Any]:
    """Sizes, and how well the inferred lexicon explains the labels."""
    texts = [text for part in corpus.texts.values() for text in part]
    return {
        "dialogues": {part: len(texts) for part, texts in corpus.texts.items()},
        "groups_of_near_duplicates": corpus.n_groups,
        "lexicon": explained(texts, corpus.labels),
        "most_telling_judge_word": {name: round(share, 3) for name, share in telling(corpus.labels).items()},
        "labelled_answers": len(found.pooled),
        "length_auroc": {persona: round(length_auroc(found.pooled, persona), 3) for persona in PERSONAS},
    }


def length_auroc(pooled: Pooled, persona: str) -> float:
    """How well the length of the answer alone tells the persona, on held-out dialogues."""
    chosen = select(pooled, persona, "held_out")
    return float(roc_auc_score(chosen.y, pooled.n_answer_tokens[chosen.rows]))


def ranked(run: Run, found: Measurement, persona: str) -> dict[str, Any]:
    """What the ranking says of the chosen latent, in all and block by block, and of the dense baselines."""
    ranking, swept = open_ranking(run, persona), Sweep.load(run.sweep(persona))
    place, row = next((i, row) for i, row in enumerate(ranking) if row.latent == swept.latent)
    return {
        "latent": row.latent,
        "place": place + 1,
        "z": round(row.z, 2),
        "p_max_t": round(row.p_max_t, 5),
        "auroc": [round(x, 4) for x in row.auroc],
        "held_out_auroc": [round(x, 4) for x in row.held_out_auroc],
        "held_out_p": round(row.held_out_p, 5),
        "firing_rate": round(row.firing_rate, 4),
        "blocks": by_block(found.pooled, ranking, row.latent),
        "dense": [{"name": d.name, "held_out_auroc": [round(x, 4) for x in d.held_out_auroc]} for d in ranking.dense],
    }


def by_block(pooled: Pooled, ranking: Ranking, latent: int) -> dict[str, list[float]]:
    """Held-out AUROC of a latent in each block of like examples, with the number of examples."""
    chosen = select(pooled, ranking.persona, "held_out")
    values = pooled.pools[ranking.config["pool"]][chosen.rows][:, [latent]].toarray().ravel()
    found = {}
    for block in np.unique(chosen.blocks):
        rows = chosen.blocks == block
        first = chosen.rows[rows][0]
        if len(set(chosen.y[rows])) == 2:
            name = f"{pooled.template[first]}, {pooled.domain[first]}"
            found[name] = [round(float(roc_auc_score(chosen.y[rows], values[rows])), 4), int(rows.sum())]
    return found


if __name__ == "__main__":
    main()
