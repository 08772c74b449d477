"""The command `couple`: which traits pull which along, and whether anything foretells it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_persona.attribution.ranking import Ranking
from sae_persona.commands.flags import with_flags, words
from sae_persona.commands.options import (
    AsJson,
    Device,
    DryRun,
    RunPath,
    Texts,
    Where,
    check_outputs,
    rows_of,
    say,
    show_result,
)
from sae_persona.errors import ConfigError, RunError
from sae_persona.report.coupling import write_coupling
from sae_persona.runs import Run
from sae_persona.stages.coupling import CoupleConfig, Couples, couple_stage
from sae_persona.stages.pipeline import questions_of
from sae_persona.stages.training import open_model
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.dial import DialConfig
from sae_persona.steering.judges import load_judge
from sae_persona.steering.positions import parse_positions
from sae_persona.studies.finetune import FinetuneConfig

N_LAB_ROWS = 500


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(couple)


@with_flags(
    skip={
        "answers": {"seed", "stop"}, "dial": {"reading", "low", "high", "tolerance", "max_steps"},
        "tuning": {"keep", "seed"},
    },
    config=CoupleConfig, answers=AnswerConfig, dial=DialConfig, tuning=FinetuneConfig,
)  # fmt: skip
def couple(
    run: RunPath,
    development: Annotated[Path, typer.Argument(metavar="DEVELOPMENT", help=f"Where strengths are matched: {Texts}.")],
    test: Annotated[Path, typer.Argument(metavar="TEST", help="Other questions, where effects are measured.")],
    config: CoupleConfig,
    answers: AnswerConfig,
    dial: DialConfig,
    tuning: FinetuneConfig,
    traits: Annotated[str, typer.Option(metavar="A,B,...", help="Ranked personas; by default all of the run.")] = "",
    rows: Annotated[
        list[str] | None,
        typer.Option(help="TRAIT=FILE: .jsonl rows that show it, to tune on, for each trait; or lab. Repeatable."),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help=f"Where co-firing is counted, by default before measured answers: {Texts}.")
    ] = None,
    judge: Annotated[str, typer.Option(help='lab, or a JSON file {"TRAIT": ["word", ...]}.')] = "lab",
    positions: Where = "answer",
    out: Annotated[Path | None, typer.Option(help="JSON file to write the result to.")] = None,
    page: Annotated[Path | None, typer.Option(help="HTML file to draw the heat maps in.")] = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Move each trait by steering and by training, measure all, and see what foretells the coupling out of sample.

    Exit status 1 if no single measure foretells any of it beyond chance.
    """
    check_outputs(out, page)
    opened = Run.open(run)
    chosen = list(words(traits)) or _ranked(opened)
    given = _rows(rows or [], chosen)
    ways = [*config.by, *(["fine-tune"] if given else [])]
    if not ways:
        raise ConfigError("there is nothing to move traits by: give --by clamp or steer, or --rows")
    asked = Couples(
        development=questions_of(development),
        test=questions_of(test),
        judge=load_judge(judge),
        answers=answers,
        dial=dial,
        rows=given,
        tuning=replace(tuning, keep=(), seed=config.seed),
    )
    if dry_run:
        text = f"{len(chosen)} traits ({', '.join(chosen)}) by {', '.join(ways)}, on {len(asked.test)} questions"
        show_result(text, {"traits": chosen, "ways": ways, "config": asdict(config)}, as_json)
        return
    found = couple_stage(
        opened,
        open_model(opened, device=device),
        chosen,
        asked,
        config,
        positions=parse_positions(positions),
        texts=texts,
        on_trait=lambda way, trait, row: say(f"{way} {trait}: " + " ".join(f"{cell.value:+.2f}" for cell in row)),
    )
    if out is not None:
        found.save(out)
    if page is not None:
        write_coupling(found, page)
    show_result(found, found.to_json(), as_json)
    if not any(found.is_foretold(at) for at in range(len(found.effects))):
        say("no single measure foretells the coupling beyond chance")
        raise typer.Exit(1)


def _ranked(run: Run) -> list[str]:
    found = [Ranking.load(path).persona for path in sorted((run.path / "rankings").glob("*.json"))]
    if not found:
        raise RunError(f"{run.path} has no rankings: run `sae-persona rank {run.path} --all` first")
    return found


def _rows(given: list[str], traits: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each trait, or none at all."""
    if given == ["lab"]:
        from sae_persona.lab.tuning import shown  # here, so that others need no lab

        return {trait: shown(N_LAB_ROWS, trait) for trait in traits}
    found = {}
    for text in given:
        trait, sign, path = text.partition("=")
        if not sign or trait not in traits:
            raise ConfigError(f"rows are given as TRAIT=FILE for one of {', '.join(traits)}, or as lab, got {text!r}")
        found[trait] = rows_of(Path(path))
    return found
