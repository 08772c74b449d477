"""One function a stage, over a run folder: read what earlier stages left there, add what this one makes."""

import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import LM
from sae_persona.activations.texts import read_texts
from sae_persona.attribution.baselines import difference_of_means
from sae_persona.attribution.causal import ScreenConfig, screen
from sae_persona.attribution.confounds import WordConfig
from sae_persona.attribution.confounds import covariates as made_covariates
from sae_persona.attribution.contrasts import Contrast, contrasts_of, read_contrasts
from sae_persona.attribution.labels import select
from sae_persona.attribution.partial import Covariates
from sae_persona.attribution.rank import RankConfig, rank_all
from sae_persona.attribution.ranking import Ranking
from sae_persona.attribution.screens import Screen
from sae_persona.attribution.splits import Labelled
from sae_persona.errors import ConfigError, DataError, ModelError, RunError
from sae_persona.features.corpus import scan
from sae_persona.features.descriptions import Descriptions
from sae_persona.features.measure import MeasureConfig, Measurement, check_measured, measure
from sae_persona.features.pooled import Pooled
from sae_persona.features.scan import Scan, ScanConfig, Share
from sae_persona.runs import Run, file_hash
from sae_persona.sae.formats import load_sae
from sae_persona.stages.training import Source, input_facts, open_sae
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.apply import intervene
from sae_persona.steering.arms import Arm, Sweep
from sae_persona.steering.bench import halves
from sae_persona.steering.controls import matched_latents
from sae_persona.steering.export.approximate import approximate
from sae_persona.steering.export.formats import write_as
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Clamp, LatentEdit, parse_edit
from sae_persona.steering.positions import Positions, Spans
from sae_persona.steering.side_effects import HeldOut
from sae_persona.steering.strength import Judge
from sae_persona.steering.sweep import Candidate, Messages, SweepConfig, sweep

FAR = 10
"""Times a latent's largest activation from which an edit is warned of."""


class FarBeyond(UserWarning):
    """An edit sets a latent to what it never came near."""


def measure_stage(run: Run, lm: LM, dialogues: Source, *, config: MeasureConfig) -> Measurement:
    """Pass labelled dialogues through model and SAE once; keep statistics, contexts and pooled examples."""
    with run.recording("measure", config=asdict(config), texts=input_facts(dialogues)) as facts:
        sae = open_sae(run, lm)
        found = measure(lm, sae.hook, sae, dialogues, config)
        if not len(found.pooled.ids):
            raise DataError("no answer in these texts has labels: give each row labels {PERSONA: 0 or 1}")
        found.save(run)
        for path in of_the_measurement(run):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        facts |= {"examples": len(found.pooled.ids), "dropped": found.dropped, "tokens": found.stats.n_tokens}
    return found


def of_the_measurement(run: Run) -> list[Path]:
    """What is in the run that speaks of what it was measured on: another measurement takes it away."""
    paths = (*(run.path / name for name in ("rankings", "screens", "sweeps")), run.descriptions)
    return [path for path in paths if path.exists()]


def scan_stage(
    run: Run,
    lm: LM,
    texts: Source,
    *,
    config: ScanConfig,
    share: Share | None = None,
    out: Path | None = None,
    on_rows: Callable[[int], object] | None = None,
) -> Scan:
    """Scan a corpus into the run's ``scan.h5``, or a share of it into a file ``out``, for `merge_stage`."""
    if (share is not None and share.world > 1) != (out is not None):
        raise ConfigError("a share of the texts goes into a file of its own: give --share and --out together")
    if out is not None and out.is_dir():
        raise RunError(f"{out} is a folder: --out names a file")

    def scanned() -> Scan:
        sae = open_sae(run, lm)
        found = scan(lm, sae.hook, sae, texts, config, share=share, on_rows=on_rows)
        found.about["texts"] = input_facts(texts)
        found.save(out or run.scan)
        return found

    if out is not None:  # several processes do this at once, and the manifest is for one
        return scanned()
    with run.recording("scan", config=asdict(config), texts=input_facts(texts)) as facts:
        found = scanned()
        facts["tokens"] = found.stats.n_tokens
    return found


def merge_stage(run: Run, parts: Sequence[Path]) -> Scan:
    """Merge scans of all shares of a corpus into the run's ``scan.h5``.

    DataError if they are not parts of one, or one is missing; ModelError if they are of another SAE than the run's.
    """
    with run.recording("scan", parts=[str(path) for path in parts]) as facts:
        found = Scan.load(parts[0])
        for path in parts[1:]:
            found.merge(Scan.load(path))
        if found.missing:
            raise DataError(f"share {found.missing[0]} of the corpus is missing: scan it and give it, too")
        if found.about.get("sae") != load_sae(run.sae).fingerprint:
            raise ModelError(f"{parts[0]} is a scan of another SAE than that of {run.path}: scan with this run")
        found.save(run.scan)
        facts |= {"config": asdict(found.config), "texts": found.about["texts"], "tokens": found.stats.n_tokens}
    return found


def rank_stage(run: Run, persona: str, *, config: RankConfig, found: Measurement | None = None) -> Ranking:
    """Rank all latents for one persona."""
    return rank_all_stage(run, (persona,), config=config, found=found)[persona]


def rank_all_stage(
    run: Run,
    personas: Sequence[str] | None,
    *,
    config: RankConfig,
    found: Measurement | None = None,
    covariates: Covariates | None = None,
    words: WordConfig | None = None,
    device: str | torch.device = "cpu",
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Ranking]:
    """Rank all latents for each persona, None for every one that is labelled and has examples enough.

    A ranking given covariates lies beside the plain one, which stays. Nothing is written if a persona that is named
    cannot be ranked; of every one, DataError if none can.

    say          hears why a persona that was not named is left out
    covariates   what ``config.given`` picks from; None: made of the measured examples, with the personas' ``words``
    """
    run.stage("measure")
    start = time.perf_counter()
    found = found or Measurement.load(run)
    personas = _rankable(found.pooled, config, say) if personas is None else personas
    if config.given and covariates is None:
        covariates = made_covariates(found.pooled, config.given, personas=personas, words=words)
    rankings = rank_all(found.pooled, found.stats, personas, config, covariates=covariates, device=device)
    # each gets its share of the one pass
    shared = {"seconds": round((time.perf_counter() - start) / len(rankings), 3), "together": len(rankings)}
    for persona, ranking in rankings.items():
        with run.recording("rank", persona=persona, config=asdict(config), **shared):
            ranking.save(run.ranking(persona, config.given))
    return rankings


def _rankable(pooled: Pooled, config: RankConfig, say: Callable[[str], object]) -> list[str]:
    """The personas with examples enough in both splits. DataError, that of the first, if there are none."""
    kept: list[str] = []
    refused: list[DataError] = []
    for persona in pooled.personas:
        try:
            Labelled.of(pooled, persona, config.within, min_confidence=config.min_confidence, force=config.force)
            kept.append(persona)
        except DataError as error:
            refused.append(error)
    if refused and not kept:
        raise refused[0]
    for error in refused:
        say(f"left out: {error}")
    return kept


def open_ranking(run: Run, persona: str) -> Ranking:
    """A ranking made before, without covariates. RunError if there is none."""
    if not run.ranking(persona).is_file():
        raise RunError(f"{run.path} has no ranking for {persona}: run `sae-persona rank {run.path} {persona}` first")
    return Ranking.load(run.ranking(persona))


def screen_stage(
    run: Run,
    lm: LM,
    persona: str,
    *,
    config: ScreenConfig,
    pairs: str | Path | Sequence[Any] | None = None,
    found: Measurement | None = None,
    output_scores: Mapping[int, float] | None = None,
) -> Screen:
    """Screen the best latents of a persona's ranking for an effect on contrast pairs.

    pairs   what ``read_contrasts`` takes; None: those that the measured dialogues hold, see ``contrasts_of``
    """
    ranking = open_ranking(run, persona)
    with run.recording("screen", persona=persona, config=asdict(config), pairs=input_facts(pairs or [])):
        contrasts = measured_contrasts(run, persona) if pairs is None else read_contrasts(pairs)
        found = found or Measurement.load(run)
        output_scores = _output_scores(run) if output_scores is None else output_scores
        made = screen(
            lm, open_sae(run, lm), ranking, contrasts, config, units=found.stats.p999, output_scores=output_scores
        )
        made.save(run.screen(persona))
    return made


def _output_scores(run: Run) -> dict[int, float]:
    """Of the latents that were described."""
    if not run.descriptions.is_file():
        return {}
    described = Descriptions.load(run)
    return {latent: one.output_score for latent, one in described.items() if one.output_score is not None}


def measured_contrasts(run: Run, persona: str) -> list[Contrast]:
    """Contrast pairs out of the dialogues that the run was measured on. DataError if those are not there any more."""
    texts = run.stage("measure")["texts"]
    wanted = "give contrast pairs as a file"
    if texts["path"] is None or texts["sha256"] is None:
        raise DataError(f"{run.path} was measured on texts that are in no file: {wanted}")
    path = Path(texts["path"])
    if not path.exists() or file_hash(path) != texts["sha256"]:
        raise DataError(f"{path} is not what {run.path} was measured on any more: {wanted}, or measure again")
    return contrasts_of(path, persona)


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


def mean_difference(pooled: Pooled, persona: str, pool: str) -> torch.Tensor:
    """Difference of means on the train split, at the token that the ranking looked at: [d_in] fp32."""
    chosen = select(pooled, persona, "train", within=(), force=True)
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
        sae = open_sae(run, lm)
        found, ranking = found or Measurement.load(run, sae), open_ranking(run, persona)
        chosen = candidates(ranking, n_candidates, latent)
        result = sweep(
            lm,
            sae,
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
    run: Run,
    lm: LM,
    name: str,
    edits: Sequence[LatentEdit],
    *,
    positions: Positions | Spans,
    out: Path | None = None,
    form: str = "native",
    prompts: Sequence[Messages] | None = None,
) -> Path:
    """Write an intervention with the evidence that the run has for its latents.

    form      a name in `FORMATS`
    prompts   chats; a direction, fitted to every other question, takes the place of the edits, and its loss is measured
              on the rest
    """
    with run.recording("export", name=name, form=form):
        sae = open_sae(run, lm)
        check_measured(run, sae)  # whose units and evidence go with the edits
        intervention = Intervention.of(lm, sae, list(edits), positions=positions, evidence=_evidence(run, edits))
        if prompts is not None:
            fitted, held_out = ([prompt_tokens(lm, chat) for chat in half] for half in halves(prompts))
            intervention = approximate(intervention, lm, fitted, held_out)
        return write_as(form, intervention, lm, out or run.intervention(name))


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
    stats = Measurement.load(run).stats
    units = stats.p999.tolist()
    edits = [parse_edit(_numbered(run, text), units) for text in texts]
    for edit in edits:
        if 0 <= edit.latent < len(units):  # others are refused where they are applied
            _warn_if_far(edit, float(stats.maximum[edit.latent]))
    return edits


def _warn_if_far(edit: LatentEdit, most: float) -> None:
    value = getattr(edit, "value", 0.0)
    if value > FAR * most > 0:
        warnings.warn(
            f"{edit.name} of latent {edit.latent} to {value:.3g} is {value / most:.0f} times the most that it ever "
            f"reached ({most:.3g}): lower the strength",
            FarBeyond,
            stacklevel=3,
        )


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
    run: Run,
    lm: LM,
    prompt: str,
    edits: Sequence[LatentEdit],
    positions: Positions | Spans,
    *,
    n: int,
    config: AnswerConfig,
) -> list[tuple[str, str]]:
    """``n`` answers to a prompt before and after the edits, sampled with the same seed."""
    sae = open_sae(run, lm)
    check_measured(run, sae)
    return before_and_after(lm, prompt, intervene(lm, sae, edits, positions=positions), n, config)


def before_and_after(
    lm: LM, prompt: str, edited: AbstractContextManager[Any], n: int, config: AnswerConfig
) -> list[tuple[str, str]]:
    """``n`` answers to a prompt outside and inside a block, sampled with the same seed.

    ConfigError for no answers or a prompt that says nothing.
    """
    if n < 1:
        raise ConfigError(f"--n counts answers from 1, got {n}")
    if not prompt.strip():
        raise ConfigError("the prompt is empty: give what the user says")
    prompts = [prompt_tokens(lm, [{"role": "user", "content": prompt}])] * n
    with edited:  # first, so that what cannot be applied is refused before the model runs
        after = answer(lm, prompts, config)
    return [(b.text, a.text) for b, a in zip(answer(lm, prompts, config), after, strict=True)]
