"""The stages that set strengths, over a run folder: one edit to a budget, several traits to their targets."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, RunError
from sae_persona.features.measure import Measurement
from sae_persona.runs import Run, write_json
from sae_persona.stages.pipeline import chosen_clamp, edits_of, mean_difference, open_ranking
from sae_persona.stages.training import open_sae
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.arms import Sweep
from sae_persona.steering.bench import Bench, Messages, Questions
from sae_persona.steering.compose import ComposeConfig, Composition, compose
from sae_persona.steering.dial import Dial, DialConfig, MakeEdits, solve_strength
from sae_persona.steering.divergence import DivergenceConfig, Track
from sae_persona.steering.interference import Ingredient, Mix
from sae_persona.steering.interventions import Placed, Scale, Steer
from sae_persona.steering.positions import Positions, Spans
from sae_persona.steering.solver import Targets
from sae_persona.steering.strength import Judge


def strength_stage(
    run: Run,
    lm: LM,
    edits: Sequence[str],
    questions: Sequence[Messages],
    *,
    positions: Positions | Spans,
    config: DialConfig,
) -> dict[str, Dial]:
    """Dial each edit, by itself, to the budget on these questions. Errors as `dialled` and `solve_strength`.

    edits   as `dialled` reads them
    """
    makes = {text: dialled(run, text) for text in edits}
    with run.recording("strength", config=asdict(config), positions=str(positions)) as facts:
        sae = open_sae(run, lm)
        prompts = Questions.of(lm, "given", questions).prompts
        track = Track(lm, prompts, config.reading)
        dials = {
            text: solve_strength(lm, sae, make, prompts, config, hook=sae.hook, positions=positions, track=track)
            for text, make in makes.items()
        }
        facts |= {"dials": {text: dial.to_json() for text, dial in dials.items()}}
    return dials


def dialled(run: Run, text: str) -> MakeEdits:
    """Read an edit without its strength: ``clamp:12`` (also pin, add, floor, ceiling), or ``steer:PERSONA``, which adds
    the difference of means. A persona in place of a latent means its best-ranked rising one.

    ConfigError for what has no strength or has one already, RunError for a persona without a ranking.
    """
    operation, _, what = text.partition(":")
    if "=" in text:
        raise ConfigError(f"the strength is solved for: write {text.partition('=')[0]} instead of {text}")
    if operation == "steer":
        ranking = open_ranking(run, what)
        direction = mean_difference(Measurement.load(run).pooled, what, ranking.config["pool"])
        return lambda strength: [Steer(direction, strength)]
    if operation in ("scale", "ablate"):
        raise ConfigError(f"{operation} has no strength in multiples of a percentile: use clamp, pin, add or floor")
    (edit,) = edits_of(run, [f"{text}=1"])
    return lambda strength: [replace(edit, strength=strength)]  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The questions and the judge of a composition."""

    development: Sequence[Messages]
    test: Sequence[Messages]
    judge: Judge
    answers: AnswerConfig
    reading: DivergenceConfig


def compose_stage(
    run: Run,
    lm: LM,
    traits: Sequence[str],
    asked: Asked,
    *,
    positions: Positions | Spans,
    targets: Targets | None,
    config: ComposeConfig,
    on_round: Callable[[dict[str, float], dict[str, float]], None] | None = None,
) -> Composition:
    """Measure how the edits of several traits interfere; given targets, solve for strengths that reach them.

    traits      as `ingredient` reads them
    positions   of edits that no sweep has placed
    """
    if len(traits) < 2:
        raise ConfigError(f"a composition has two traits or more, got {len(traits)}: give another --trait")
    sae = open_sae(run, lm)
    parts = [ingredient(run, text, positions) for text in traits]
    config_facts = {"config": asdict(config), "answers": asdict(asked.answers), "traits": list(traits)}
    with run.recording("compose", **config_facts) as facts:
        development, test = (
            Mix(
                Bench(lm, sae, asked.judge, Questions.of(lm, name, chats), asked.answers, sae.hook),
                parts,
                asked.reading,
            )
            for name, chats in (("development", asked.development), ("test", asked.test))
        )
        found = compose(development, test, targets, config, on_round=on_round)
        path = composition_path(run, [part.trait for part in parts])
        write_json(path, {"format": 1, **found.to_json()})
        facts |= {"file": path.name, "verdict": found.solution.verdict if found.solution else None, "met": found.met}
    return found


def composition_path(run: Run, traits: Sequence[str]) -> Path:
    """Where a composition of these traits is kept."""
    return run.path / "compositions" / f"{quote('+'.join(traits), safe=' +')}.json"


def ingredient(run: Run, text: str, positions: Positions | Spans) -> Ingredient:
    """Read ``TRAIT``, which takes the clamp that its sweep chose, or ``TRAIT=EDIT``, such as ``formal=clamp:12=1.5``.

    ConfigError for an edit that has no strength, RunError for a trait without a sweep.
    """
    trait, _, edit_text = text.partition("=")
    if edit_text:
        (edit,) = edits_of(run, [edit_text])
    else:
        path = run.sweep(trait)
        if not path.is_file():
            raise RunError(f"{run.path} has no sweep of {trait}: sweep it, or give its edit as {trait}=clamp:LATENT=1")
        swept = Sweep.load(path)
        edit, positions = chosen_clamp(swept), swept.positions
    strength: float = getattr(edit, "strength", math.nan)
    if isinstance(edit, Scale) or math.isnan(strength):
        raise ConfigError(f"{edit_text} has no strength to solve for: use clamp, pin, add or floor")
    return Ingredient(
        trait=trait,
        make=lambda s: [Placed(edit=replace(edit, strength=s), positions=positions)],  # pyright: ignore[reportCallIssue]
        strength=strength,
    )


def parse_rates(texts: Sequence[str]) -> dict[str, float]:
    """Read ``TRAIT=RATE`` each. ConfigError on anything else."""
    found = {}
    for text in texts:
        trait, _, rate = text.rpartition("=")
        try:
            found[trait] = float(rate)
        except ValueError:
            trait = ""
        if not trait:
            raise ConfigError(f"a target reads TRAIT=RATE, such as formal=0.8, got {text!r}")
    return found
