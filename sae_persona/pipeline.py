"""One function a stage, over a run folder: read what earlier stages left there, add what this one makes."""

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import LM
from sae_persona.activations.texts import read_texts
from sae_persona.attribution.baselines import difference_of_means
from sae_persona.attribution.labels import select
from sae_persona.attribution.rank import RankConfig, rank
from sae_persona.attribution.ranking import Ranking
from sae_persona.errors import DataError, RunError
from sae_persona.features.measure import MeasureConfig, Measurement, measure
from sae_persona.features.pooled import Pooled
from sae_persona.runs import Run
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.apply import intervene
from sae_persona.steering.arms import Arm, Sweep
from sae_persona.steering.export.native import export
from sae_persona.steering.interventions import Clamp, LatentEdit, parse_edit
from sae_persona.steering.positions import Positions
from sae_persona.steering.side_effects import HeldOut
from sae_persona.steering.strength import Judge
from sae_persona.steering.sweep import Candidate, Messages, SweepConfig, sweep
from sae_persona.training import Source, input_facts, open_sae


def measure_stage(run: Run, lm: LM, dialogues: Source, *, config: MeasureConfig) -> Measurement:
    """Pass labelled dialogues through model and SAE once; keep statistics, contexts and pooled examples."""
    with run.recording("measure", config=asdict(config), texts=input_facts(dialogues)) as facts:
        sae = open_sae(run, lm)
        found = measure(lm, sae.hook, sae, dialogues, config)
        if not len(found.pooled.ids):
            raise DataError("no answer in these texts has labels: give each row labels {PERSONA: 0 or 1}")
        found.save(run)
        for folder in ("rankings", "sweeps"):  # they speak of what was measured before
            shutil.rmtree(run.path / folder, ignore_errors=True)
        facts |= {"examples": len(found.pooled.ids), "dropped": found.dropped, "tokens": found.stats.n_tokens}
    return found


def rank_stage(run: Run, persona: str, *, config: RankConfig, found: Measurement | None = None) -> Ranking:
    """Rank all latents for one persona."""
    run.stage("measure")
    with run.recording("rank", persona=persona, config=asdict(config)):
        found = found or Measurement.load(run)
        ranking = rank(found.pooled, found.stats, persona, config)
        ranking.save(run.ranking(persona))
    return ranking


def open_ranking(run: Run, persona: str) -> Ranking:
    """A ranking made before. RunError if there is none."""
    if not run.ranking(persona).is_file():
        raise RunError(f"{run.path} has no ranking for {persona}: run `sae-persona rank {run.path} {persona}` first")
    return Ranking.load(run.ranking(persona))


def candidates(ranking: Ranking, n: int, latent: int | None = None) -> list[Candidate]:
    """The best ``n`` latents that rise with the persona, or the one that was asked for."""
    if latent is not None:
        rows = [row for row in ranking if row.latent == latent]
        if not rows:
            raise DataError(f"latent {latent} is not in the ranking for {ranking.persona}: rank with a larger --top")
    else:
        rows = [row for row in ranking if row.direction > 0][:n]
    return [Candidate(latent=row.latent, unit=row.p999) for row in rows]


def rates_at(found: Measurement, positions: Positions) -> np.ndarray:
    """How often each latent fires on the tokens that a clamp would edit: [n_latents]."""
    if positions != "pre":
        return found.stats.firing_rate.numpy()
    values = found.pooled.pools["pre"]
    return values.getnnz(axis=0) / max(1, len(found.pooled.ids))


def matched_latents(rates: np.ndarray, taken: Iterable[int], latent: int, n: int, *, seed: int) -> list[int]:
    """``n`` random latents out of the 4 n that are nearest to ``latent`` in firing rate, without those ``taken``.

    rates   [n_latents] where the clamp will act: latents that fire elsewhere only would be easy controls
    """
    free = np.flatnonzero((rates > 0) & ~np.isin(np.arange(len(rates)), list(taken)))
    distance = np.abs(np.log(rates[free]) - np.log(rates[latent]))
    nearest = free[np.argsort(distance, kind="stable")[: 4 * n]]
    picked = np.random.default_rng(seed).permutation(nearest)[:n]
    return [int(i) for i in picked]


def mean_difference(pooled: Pooled, persona: str, pool: str) -> torch.Tensor:
    """Difference of means on the train split, at the token that the ranking looked at: [d_in] fp32."""
    chosen = select(pooled, persona, "train")
    x = pooled.dense["pre" if pool == "pre" else "mean"][chosen.rows]
    return torch.from_numpy(difference_of_means(x, chosen.y)).float()


def sweep_stage(
    run: Run,
    lm: LM,
    persona: str,
    *,
    development: Sequence[Messages],
    test: Sequence[Messages],
    judge: Judge,
    config: SweepConfig,
    persona_prompt: str | None = None,
    held_out: Source | None = None,
    n_candidates: int = 3,
    latent: int | None = None,
    found: Measurement | None = None,
    on_arm: Callable[[Arm], None] | None = None,
) -> Sweep:
    """Choose a latent and a strength for a persona, and measure them beside their controls.

    held_out   texts on which the cross entropy of the test arms is read
    """
    with run.recording("sweep", persona=persona, config=asdict(config)) as facts:
        found, ranking = found or Measurement.load(run), open_ranking(run, persona)
        chosen = candidates(ranking, n_candidates, latent)
        result = sweep(
            lm,
            open_sae(run, lm),
            persona,
            candidates=chosen,
            matched=lambda latent: _random_latents(found, ranking, chosen, latent, config),
            direction=mean_difference(found.pooled, persona, ranking.config["pool"]),
            development=development,
            test=test,
            judge=judge,
            persona_prompt=persona_prompt,
            held_out=None if held_out is None else HeldOut(lm, held_out),
            config=config,
            on_arm=on_arm,
        )
        result.save(run.sweep(persona))
        facts |= {"latent": result.latent, "strength": result.strength}
    return result


def _random_latents(
    found: Measurement, ranking: Ranking, chosen: Sequence[Candidate], latent: int, config: SweepConfig
) -> list[int]:
    """Controls that fire as often as ``latent`` and do not tell the persona themselves (p max-T above 5 %)."""
    taken = {row.latent for row in ranking if row.p_max_t <= 0.05} | {candidate.latent for candidate in chosen}
    rates = rates_at(found, config.positions)
    return matched_latents(rates, taken, latent, config.n_random, seed=config.answers.seed)


def export_stage(
    run: Run, lm: LM, name: str, edits: Sequence[LatentEdit], *, positions: Positions, out: Path | None = None
) -> Path:
    """Write an intervention with the evidence that the run has for its latents."""
    with run.recording("export", name=name):
        sae = open_sae(run, lm)
        path = out or run.intervention(name)
        return export(path, lm, sae, list(edits), positions=positions, evidence=_evidence(run, edits))


def _evidence(run: Run, edits: Sequence[LatentEdit]) -> dict[str, Any]:
    """Ranking rows and sweep arms of the edited latents."""
    latents = {edit.latent for edit in edits}
    rows, arms = [], []
    for path in sorted((run.path / "rankings").glob("*.json")):
        ranking = Ranking.load(path).to_json()
        rows += [{"persona": ranking["persona"], **row} for row in ranking["rows"] if row["latent"] in latents]
    for path in sorted((run.path / "sweeps").glob("*.json")):
        swept = Sweep.load(path)
        if swept.latent in latents:
            arms += [{"persona": swept.persona, **arm} for arm in swept.to_json()["arms"] if arm["part"] == "test"]
    return {"rankings": rows, "arms": arms}


def edits_of(run: Run, texts: Sequence[str]) -> list[LatentEdit]:
    """Read edits; where one names a persona, its best-ranked rising latent is meant.

    ConfigError for a text that is no edit or a latent that does not exist, RunError for a persona without a ranking.
    """
    units = Measurement.load(run).stats.p999.tolist()
    return [parse_edit(_numbered(run, text), units) for text in texts]


def _numbered(run: Run, text: str) -> str:
    named = re.fullmatch(r"(\w+):([^=]*[^=\d][^=]*)(=.*)?", text)
    if named is None:
        return text
    best = candidates(open_ranking(run, named[2]), 1)
    if not best:
        raise DataError(f"no latent rises with {named[2]}: give the number of one that falls")
    return f"{named[1]}:{best[0].latent}{named[3] or ''}"


def chosen_clamp(swept: Sweep) -> Clamp:
    """The clamp that a sweep settled on."""
    return Clamp(swept.latent, swept.strength, swept.unit)


def questions_of(source: Source) -> list[Messages]:
    """Chats to answer: the messages of each row up to the last user's question; a plain text is one question."""
    chats: list[Messages] = []
    for row in read_texts(source):
        messages = [{"role": "user", "content": row}] if isinstance(row, str) else list(row.messages)
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if messages:
            chats.append(messages)
    if not chats:
        raise DataError("no question in these texts: a row needs messages that a user's message ends")
    return chats


def try_edits(
    run: Run, lm: LM, prompt: str, edits: Sequence[LatentEdit], positions: Positions, *, n: int, config: AnswerConfig
) -> list[tuple[str, str]]:
    """``n`` answers to a prompt before and after the edits, sampled with the same seed."""
    prompts = [prompt_tokens(lm, [{"role": "user", "content": prompt}])] * n
    before = answer(lm, prompts, config)
    with intervene(lm, open_sae(run, lm), edits, positions=positions):
        after = answer(lm, prompts, config)
    return [(b.text, a.text) for b, a in zip(before, after, strict=True)]
