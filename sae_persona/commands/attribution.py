"""Commands that rank latents and test rankings further: `screen` in the model, `stability` on other SAEs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sae_persona.activations.lm import checked_device
from sae_persona.attribution.causal import ScreenConfig
from sae_persona.attribution.confounds import WordConfig
from sae_persona.attribution.rank import RankConfig
from sae_persona.attribution.ranking import Ranking
from sae_persona.attribution.screens import Screen
from sae_persona.attribution.stability import StabilityConfig, stability
from sae_persona.commands.flags import with_flags
from sae_persona.commands.options import AsJson, Device, say, show_result
from sae_persona.errors import ConfigError, FormatError, ModelError
from sae_persona.runs import Run, read_json
from sae_persona.sae.formats import load_sae
from sae_persona.stages import pipeline
from sae_persona.stages.training import open_model

Persona = Annotated[str, typer.Argument(metavar="PERSONA", help="A persona that was ranked.")]
Pairs = (
    'Rows {"messages": [...], "answers": {"with": "...", "without": "..."}}, .jsonl or .parquet; by default those '
    "that the measured dialogues hold."
)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(name="rank")(rank)
    app.command(name="screen")(screen)
    app.command(name="stability")(compare)


@with_flags(config=RankConfig)
def rank(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    config: RankConfig,
    persona: Annotated[
        list[str] | None, typer.Argument(metavar="PERSONA...", help="Personas that the measured labels name.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every persona with examples enough.")] = False,
    words: Annotated[
        Path | None, typer.Option(help='JSON {"PERSONA": ["word", ...]}, for --given trait_words.')
    ] = None,
    and_screen: Annotated[
        bool, typer.Option("--screen", help="Then set the best latents in the model, as `screen` does.")
    ] = False,
    pairs: Annotated[Path | None, typer.Option(help=f"For --screen. {Pairs}")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Rank the latents by how well they tell a persona; test the order and repeat it on held-out answers.

    Several personas are ranked in one pass. --given takes length, position, turn, template, topic, author, sentiment,
    trait_words, class_words and what rows bring as covariates; such a ranking lies beside the plain one, which search,
    screen, stability and report go on from. Exit status 1 if no latent tells any of them better than
    chance or, with --screen, if none of those has an effect.
    """
    if every == bool(persona):
        raise ConfigError("name the personas to rank, or pass --all, and not both")
    if and_screen and config.given:
        raise ConfigError("--screen sets the latents of the plain ranking: rank without --given to screen")
    if words is not None and "trait_words" not in config.given:
        raise ConfigError("--words lists what --given trait_words counts: give both, or neither")
    opened = Run.open(run)
    rankings = pipeline.rank_all_stage(
        opened, None if every else persona, config=config, words=_words(words), device=checked_device(device), say=say
    )
    found = list(rankings.values())
    texts, values = [str(ranking) for ranking in found], [ranking.to_json() for ranking in found]
    beaten = [ranking.persona for ranking in found if ranking[0].p_max_t > 0.05]
    told = [ranking for ranking in found if ranking.persona not in beaten]
    causal = not and_screen
    if and_screen:
        screens = _screens(opened, told, pairs, device)
        causal = any(one.causal for one in screens.values())
        texts += [str(one) for one in screens.values()]
        values = [value | {"screen": _json(screens.get(value["persona"]))} for value in values]
    show_result("\n\n".join(texts), values if every or len(found) > 1 else values[0], as_json)
    if beaten:
        say(f"no latent tells {', '.join(beaten)} better than chance at 5 % (max-T)")
    if not told or not causal:
        raise typer.Exit(1)


def _words(path: Path | None) -> WordConfig | None:
    if path is None:
        return None
    lists = read_json(path, "word list")
    if not isinstance(lists, dict):
        raise FormatError(f'{path} holds no word lists: write {{"PERSONA": ["word", ...]}}')
    return WordConfig(lists=lists)


def _screens(run: Run, rankings: Sequence[Ranking], pairs: Path | None, device: str) -> dict[str, Screen]:
    """A screen for each persona that a latent tells."""
    if not rankings:
        return {}
    lm = open_model(run, device=device)
    return {
        one.persona: pipeline.screen_stage(run, lm, one.persona, config=ScreenConfig(), pairs=pairs) for one in rankings
    }


def _json(found: Screen | None) -> object:
    return None if found is None else found.to_json()


@with_flags(config=ScreenConfig)
def screen(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    persona: Persona,
    config: ScreenConfig,
    pairs: Annotated[
        Path | None,
        typer.Argument(
            metavar="PAIRS",
            help=Pairs,
        ),
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Set the best-ranked latents in the model: do they make it prefer the persona's answers?"""
    opened = Run.open(run)
    pipeline.open_ranking(opened, persona)
    found = pipeline.screen_stage(opened, open_model(opened, device=device), persona, config=config, pairs=pairs)
    show_result(found, found.to_json(), as_json)
    if not found.causal:
        say(f"no latent that tells {persona} has an effect of the sign that its association says")
        raise typer.Exit(1)


@with_flags(config=StabilityConfig)
def compare(
    persona: Persona,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Run folders, two or more.")],
    config: StabilityConfig,
    as_json: AsJson = False,
) -> None:
    """Does a persona's ranking survive on SAEs of other seeds or widths?"""
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a ranking survives in its own run: name each run once")
    opened = [Run.open(run) for run in runs]
    rankings = [pipeline.open_ranking(run, persona) for run in opened]
    models = {run.stage("train")["model"]["config_hash"] for run in opened}
    if len(models) > 1:
        raise ModelError(f"SAEs of one model are compared, these runs are of {len(models)}")
    found = stability([load_sae(run.sae) for run in opened], rankings, config, names=[str(run.path) for run in opened])
    show_result(found, found.to_json(), as_json)
    if not found.survives:
        say(f"the ranking for {persona} does not survive in every comparison")
        raise typer.Exit(1)
