"""Commands that write interventions for other tools and apply those of others: `export`, `apply`."""

from pathlib import Path
from typing import Annotated

import typer

from sae_persona.activations.lm import load_lm
from sae_persona.commands.flags import with_flags
from sae_persona.commands.options import AsJson, At, Device, Edits, RunPath, Where, show_answers
from sae_persona.errors import ConfigError, RunError
from sae_persona.runs import Run
from sae_persona.sae.formats import is_sae, load_sae
from sae_persona.sae.model import SAE
from sae_persona.stages import pipeline
from sae_persona.stages.training import open_model
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.export.approximate import check_prompts
from sae_persona.steering.export.formats import FORMATS, format_of
from sae_persona.steering.export.importing import import_intervention
from sae_persona.steering.positions import parse_positions


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(export)
    app.command()(apply)


def export(
    run: RunPath,
    out: Annotated[
        Path, typer.Option(help="File or folder to write; native files end in .json, their tensors go beside it.")
    ],
    edit: Edits,
    format: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(FORMATS)}.")] = "native",
    positions: Where = "answer",
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate",
            help="Fold the edits into a direction that is added at every token, and write what is lost into the file.",
        ),
    ] = False,
    texts: Annotated[
        Path | None,
        typer.Option(help="Questions to approximate on: half give the direction, on the others the loss is measured."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write edits as a file, ours or another tool's, with the evidence that the run has for their latents."""
    opened, at = Run.open(run), parse_positions(positions)
    if approximate != (texts is not None):
        raise ConfigError("--approximate measures on --texts QUESTIONS: give both or none of them")
    taken = [path for path in format_of(format).files(out) if path.exists()]
    if taken and not force:
        raise RunError(f"{taken[0]} is there already: choose another --out, or pass --force to replace it")
    prompts = None if texts is None else pipeline.questions_of(texts)
    check_prompts(prompts)
    lm = open_model(opened)
    edits = pipeline.edits_of(opened, edit)
    path = pipeline.export_stage(opened, lm, out.stem, edits, positions=at, out=out, form=format, prompts=prompts)
    typer.echo(path)


@with_flags(answers=AnswerConfig)
def apply(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Ours (.json), a control vector (.gguf), lm-eval or persona vectors (.pt)."
        ),
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder in Hugging Face layout, hub id, or lab.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the user says.")],
    answers: AnswerConfig,
    sae: Annotated[Path | None, typer.Option(help="SAE folder or run, where the file needs one (TopK).")] = None,
    layer: Annotated[int | None, typer.Option(help="Of persona vectors, which hold one a layer.")] = None,
    strength: Annotated[float, typer.Option(help="Factor of the vectors of other tools.")] = 1.0,
    positions: Annotated[
        str | None, typer.Option(help=f"Of the vectors of other tools: {At}; every if not given.")
    ] = None,
    n: Annotated[int, typer.Option(help="Answers of each kind.")] = 3,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Answers to one prompt before and after an intervention from a file, side by side."""
    lm = load_lm(model, device=device)
    at = None if positions is None else parse_positions(positions)
    whole = None if sae is None else _open(sae).to(lm.device)
    loaded = import_intervention(file, lm, sae=whole, layer=layer, strength=strength, positions=at)
    show_answers(pipeline.before_and_after(lm, prompt, loaded.applied(lm), n, answers), as_json)


def _open(folder: Path) -> SAE:
    return load_sae(folder if is_sae(folder) else Run.open(folder).sae)
