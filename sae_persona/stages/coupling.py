"""Coupling over a run folder: each ranked persona is moved at matched strength, all are judged, predictors compared."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from scipy import sparse

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, DataError, RunError
from sae_persona.features.measure import MeasureConfig, Measurement
from sae_persona.features.pooled import to_csr
from sae_persona.runs import Run
from sae_persona.sae.model import SAE
from sae_persona.stages.dosing import dialled
from sae_persona.stages.pairing import activations
from sae_persona.stages.pipeline import mean_difference, open_ranking
from sae_persona.stages.training import Source, open_sae
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.bench import Bench, Messages, Questions
from sae_persona.steering.dial import DialConfig, OutOfReach, solve_strength
from sae_persona.steering.divergence import Track
from sae_persona.steering.positions import Positions, Spans
from sae_persona.steering.strength import Judge
from sae_persona.studies.coupling import Coupling, Effects, OnTrait, steered_effects, tuned_effects
from sae_persona.studies.finetune import FinetuneConfig
from sae_persona.studies.foretelling import FEWEST, foretell
from sae_persona.studies.relatedness import relatedness
from sae_persona.types import HookPoint

WAYS = ("clamp", "steer")


@dataclass(frozen=True, kw_only=True)
class CoupleConfig:
    """How traits are moved and compared."""

    by: tuple[str, ...] = WAYS
    """clamp: the best latent that rises with the trait; steer: its difference of means."""
    top: int = 20
    """Latents of each ranking whose overlap is measured."""
    batches: int = 20
    """Of texts on which co-firing is counted, at most."""
    permutations: int = 999
    """Relabellings of the traits."""
    resamples: int = 1000
    """Draws of traits, for intervals."""
    seed: int = 0
    """Of both, and of sampled answers."""

    def __post_init__(self) -> None:
        if not set(self.by) <= set(WAYS) or len(set(self.by)) < len(self.by):
            raise ConfigError(f"by is {' and '.join(WAYS)}, each once, got {', '.join(self.by)}")
        if min(self.top, self.batches, self.permutations, self.resamples) < 1:
            raise ConfigError(
                "top, batches, permutations and resamples are at least 1, "
                f"got {self.top}, {self.batches}, {self.permutations}, {self.resamples}"
            )


@dataclass(frozen=True, kw_only=True)
class Couples:
    """What is asked of moved models. development: where strengths are matched; test: where effects are measured."""

    development: Sequence[Messages]
    test: Sequence[Messages]
    judge: Judge
    answers: AnswerConfig
    dial: DialConfig
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    """Trait -> rows that show it; empty: no fine-tunes."""
    tuning: FinetuneConfig


def couple_stage(
    run: Run,
    lm: LM,
    traits: Sequence[str],
    asked: Couples,
    config: CoupleConfig,
    *,
    positions: Positions | Spans,
    texts: Source | None = None,
    on_trait: OnTrait | None = None,
) -> Coupling:
    """Move each of the traits, measure all of them.

    texts   on which co-firing is counted; None: at the token before each measured answer

    RunError for a trait without a ranking; DataError for fewer traits than can be foretold, one without a rising
    latent, or one without rows where others have some; other errors as each part's.
    """
    if len(traits) < FEWEST or len(set(traits)) < len(traits):
        raise DataError(f"coupling needs {FEWEST} different traits or more, got {', '.join(traits) or 'none'}")
    if asked.rows and (lost := [trait for trait in traits if not asked.rows.get(trait)]):
        raise DataError(f"there are no rows to tune {lost[0]} on: give some for each trait, or for none")
    rankings = {trait: open_ranking(run, trait) for trait in traits}
    if flat := [trait for trait, ranking in rankings.items() if not any(row.direction > 0 for row in ranking)]:
        raise RunError(f"no latent rises with {flat[0]}: leave it out")
    sae, pooled = open_sae(run, lm), Measurement.load(run).pooled
    pools = [ranking.config["pool"] for ranking in rankings.values()]
    rising = [[row.latent for row in ranking if row.direction > 0][: config.top] for ranking in rankings.values()]
    means = torch.stack([mean_difference(pooled, *pair) for pair in zip(traits, pools, strict=True)])
    fires = pooled.pools["pre"] if texts is None else fired(lm, sae, sae.hook, texts, config.batches)
    measures = relatedness(sae, means, rising, fires)
    bench = Bench(
        lm, sae, asked.judge, Questions.of(lm, "test", asked.test), asked.answers, hook=sae.hook, positions=positions
    )
    with run.recording("couple", config=asdict(config), traits=list(traits)):
        effects = [_moved(run, bench, traits, way, asked, config, on_trait) for way in config.by]
        if asked.rows:
            effects.append(tuned_effects(bench, asked.rows, traits, asked.tuning, seed=config.seed, on_trait=on_trait))
    foretold = [
        foretell(one.values, measures, permutations=config.permutations, resamples=config.resamples, seed=config.seed)
        for one in effects
    ]
    return Coupling(
        model=lm.name,
        traits=tuple(traits),
        config=asdict(config) | {"budget": asked.dial.budget, "positions": str(positions)},
        relatedness={name: tuple(tuple(map(float, row)) for row in m) for name, m in measures.items()},
        effects=tuple(effects),
        foretold=tuple(tuple(one) for one in foretold),
    )


def fired(lm: LM, sae: SAE, hook: HookPoint, texts: Source, batches: int) -> sparse.csr_matrix:
    """Latents on the tokens of texts, [tokens, n_latents]: of so many batches of texts at most."""
    most = MeasureConfig.context_size
    size = min(most, lm.n_positions or most)
    read = activations(lm, hook, texts, MeasureConfig(context_size=size))
    parts = [to_csr(sae.encode(x.to(sae.w_enc.device)), sae.n_latents) for x in islice(read, batches)]
    return sparse.csr_matrix(sparse.vstack(parts))


def _moved(
    run: Run, bench: Bench, traits: Sequence[str], way: str, asked: Couples, config: CoupleConfig,
    on_trait: OnTrait | None,
) -> Effects:  # fmt: skip
    """Effects of every trait's edit at the strength that meets the budget, or comes nearest."""
    makes = {trait: dialled(run, f"{way}:{trait}") for trait in traits}
    prompts = Questions.of(bench.lm, "development", asked.development).prompts
    track = Track(bench.lm, prompts, asked.dial.reading)
    edits, strengths, notes = {}, [], []
    for trait, make in makes.items():
        try:
            strength = solve_strength(
                bench.lm, bench.saes, make, prompts, asked.dial, hook=bench.hook, positions=bench.positions, track=track
            ).strength
        except OutOfReach as error:
            strength = error.strength
            reached = error.readings.kl_tail
            notes.append(
                f"{way}:{trait} meets no budget of {asked.dial.budget:g} nats: {reached:.2f} at {strength:.3g}"
            )
        edits[trait] = make(strength)
        strengths.append(strength)
    answers = replace(asked.answers, seed=config.seed)
    return steered_effects(
        way, replace(bench, answers=answers), edits, strengths, notes=notes, seed=config.seed, on_trait=on_trait
    )
