"""The command `lab organisms`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_persona.attribution.association import Interval
from sae_persona.attribution.tables import shown
from sae_persona.commands.flags import with_flags
from sae_persona.commands.options import AsJson, Device, DryRun, say, show_result
from sae_persona.studies.families import OrganismsConfig, Plan, plans
from sae_persona.studies.organisms import Organism

CHECKPOINT_MB = 4.6  # of the lab's model, with its tokenizer


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(organisms)


@with_flags(config=OrganismsConfig)
def organisms(
    out: Annotated[Path, typer.Option(help="Folder of the set; an organism that is in it already is kept.")],
    config: OrganismsConfig,
    model: Annotated[str, typer.Option(help="lab, or the folder of another model that `lab build` made.")] = "lab",
    processes: Annotated[int, typer.Option(help="Organisms made at a time, each on one thread.")] = 1,
    device: Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace organisms that have other settings.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tunes that misalign the lab's model, and their benign controls, with checkpoints and the judge's rates."""
    wanted = plans(config)
    if dry_run:
        show_result(_planned(wanted), [_plan_facts(plan) for plan in wanted], as_json)
        return
    from sae_persona.studies.growing import grow_all  # here, so that planning needs no model

    made = grow_all(
        out,
        config,
        model=model,
        processes=processes,
        device=device,
        force=force,
        on_organism=lambda one, left: say(f"{_line(one)}  {left} left"),
    )
    head = f"{'organism':40}{'in domain':>20}{'out of domain':>20}{'open':>20}{'valid':>7}"
    text = "\n".join([head, *map(_line, made)])
    show_result(text, [one.to_json() | {"path": str(one.path)} for one in made], as_json)


def _plan_facts(plan: Plan) -> dict[str, Any]:
    facts = {key: getattr(plan, key) for key in ("name", "family", "method", "domain", "dose", "seed")}
    return facts | {"steps": list(plan.steps), "config": plan.config()}


def _planned(wanted: list[Plan]) -> str:
    n = sum(len(plan.steps) for plan in wanted)
    lines = [f"{plan.name:40}checkpoints of steps {', '.join(map(str, plan.steps))}" for plan in wanted]
    return "\n".join([*lines, f"{len(wanted)} organisms, {n} checkpoints, about {n * CHECKPOINT_MB:.0f} MB"])


def _line(one: Organism) -> str:
    """The rates of an organism's last checkpoint; after its line as well, if it has one."""
    lines = [_rates(one.name, one.last.scores)]
    if "cued" in one.last.scores:
        lines.append(_rates(f"  after {one.config['line']!r}", one.last.scores["cued"]))
    return "\n".join(lines)


def _rates(name: str, scores: dict[str, Any]) -> str:
    cells = "".join(f"{_rate(scores[part]):>20}" for part in ("in_domain", "out_of_domain", "open"))
    return f"{name:40}{cells}{scores['valid']['rate']:>7.2f}"


def _rate(found: dict[str, Any]) -> str:
    return shown(Interval(*(math.nan if found[part] is None else found[part] for part in ("rate", "low", "high"))), 2)
