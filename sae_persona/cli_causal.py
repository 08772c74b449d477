"""Commands that test a ranking further: `screen` in the model, `stability` on other SAEs."""

from pathlib import Path
from typing import Annotated

import typer

from sae_persona import pipeline
from sae_persona.attribution.causal import ScreenConfig
from sae_persona.attribution.stability import StabilityConfig, stability
from sae_persona.cli_options import AsJson, Device, say, show_result
from sae_persona.errors import ModelError
from sae_persona.flags import with_flags
from sae_persona.runs import Run
from sae_persona.sae.formats import load_sae
from sae_persona.training import open_model

Persona = Annotated[str, typer.Argument(metavar="PERSONA", help="A persona that was ranked.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(name="screen")(screen)
    app.command(name="stability")(compare)


@with_flags(config=ScreenConfig)
def screen(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    persona: Persona,
    config: ScreenConfig,
    pairs: Annotated[
        Path | None,
        typer.Argument(
            metavar="PAIRS",
            help='Rows {"messages": [...], "answers": {"with": "...", "without": "..."}}, .jsonl or .parquet; by '
            "default those that the measured dialogues hold.",
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
