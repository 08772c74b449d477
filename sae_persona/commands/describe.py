"""The command `describe`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from sae_persona.commands.flags import with_flags
from sae_persona.commands.options import AsJson, Device, DryRun, say, show_result
from sae_persona.errors import ConfigError
from sae_persona.features.describe import DescribeConfig
from sae_persona.features.descriptions import Description
from sae_persona.features.explain import ExplainConfig
from sae_persona.features.explainers import AskConfig, open_explainer
from sae_persona.features.measure import Measurement
from sae_persona.runs import Run
from sae_persona.stages import describing
from sae_persona.stages.training import open_model

SHOWN = 20


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(describe)


@with_flags(config=DescribeConfig, explaining=ExplainConfig, asking=AskConfig)
def describe(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that was measured.")],
    config: DescribeConfig,
    explaining: ExplainConfig,
    asking: AskConfig,
    latents: Annotated[list[int] | None, typer.Argument(metavar="LATENT", help="Latents; by default all.")] = None,
    top: Annotated[int | None, typer.Option(help="Only so many, the first of --persona or by firing rate.")] = None,
    persona: Annotated[str | None, typer.Option(help="Latents of this persona's ranking.")] = None,
    explainer: Annotated[
        str | None,
        typer.Option(
            help="Who explains latents in words: openai:MODEL@URL, such as openai:qwen@http://127.0.0.1:8000/v1 (a key "
            "is taken from OPENAI_API_KEY), or hf:MODEL, a chat model run here. Without it, nobody is asked."
        ),
    ] = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Tokens that latents promote, scores of what they read and do, and explanations where an explainer is given."""
    opened = Run.open(run)
    opened.stage("measure")
    found = Measurement.load(opened)
    chosen = describing.choose_latents(opened, found, latents or [], top=top, persona=persona)
    if dry_run and explainer is None:
        raise ConfigError("--dry-run counts requests to an explainer: give --explainer")
    who = open_explainer(explainer, asking, device=device) if explainer else None
    lm = open_model(opened, device=device)
    settings = {"config": config, "explaining": explaining, "found": found}
    if dry_run and who:
        plan = describing.plan_stage(opened, lm, chosen, who.name, answer_tokens=asking.answer_tokens, **settings)
        show_result(plan, asdict(plan), as_json)
        return
    with (
        tqdm(total=len(chosen), unit="latent", dynamic_ncols=True) as bar,
        tqdm(total=len(chosen), unit="explained", dynamic_ncols=True, disable=who is None) as told,
    ):
        made = describing.describe_stage(
            opened, lm, chosen, explainer=who, on_described=bar.update, on_explained=lambda _: told.update(), **settings
        )
    rows = [_row(each) for each in made.descriptions[:SHOWN]]
    more = len(made.descriptions) - len(rows)
    ending = [f"{more} more: {opened.descriptions}" if more > 0 else str(opened.descriptions)]
    show_result("\n\n".join([*rows, *ending]), [asdict(each) for each in made.descriptions], as_json)
    if who:
        say(
            f"{made.explained} of {len(chosen)} latents explained, {made.failed} with an error, "
            f"{made.requests} requests; every prompt and answer: {opened.explanations}"
        )
        if not made.explained:
            raise typer.Exit(1)


def _row(description: Description) -> str:
    return f"latent {description.latent}\n" + "\n".join(f"  {line}" for line in str(description).splitlines())
