"""Commands about labels, before a model reads anything: `labels check`, `labels split`, `labels join`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sae_persona.activations.dialogues import Dialogue
from sae_persona.activations.texts import read_texts
from sae_persona.attribution.label_check import CheckConfig, check_labels
from sae_persona.attribution.label_join import join_labels
from sae_persona.attribution.label_split import SplitConfig, scarce, split_dialogues
from sae_persona.commands.flags import with_flags
from sae_persona.commands.options import AsJson, Texts, say, show_result
from sae_persona.errors import RunError
from sae_persona.runs import write_text

Dialogues = Annotated[Path, typer.Argument(metavar="DIALOGUES", help=f"Labelled rows: {Texts}.")]
Out = Annotated[Path, typer.Option(help="JSONL file to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file that is at --out.")]

labels_app = typer.Typer(no_args_is_help=True, help="Check labels, split them, and join them from another file.")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(labels_app, name="labels")


@labels_app.command()
@with_flags(config=CheckConfig)
def check(dialogues: Dialogues, config: CheckConfig, as_json: AsJson = False) -> None:
    """Class balance, groups, ids that stand twice, near duplicates over splits; exit status 1 if something is wrong."""
    found = check_labels(read_texts(dialogues), config)
    show_result(found, found.to_json(), as_json)
    if not found.holds:
        say("leaks, ids that stand twice, or a persona that cannot be ranked: see above")
        raise typer.Exit(1)


@labels_app.command()
@with_flags(config=SplitConfig)
def split(dialogues: Dialogues, out: Out, config: SplitConfig, force: Force = False) -> None:
    """Write labelled rows with their split set: groups whole, near duplicates never on both sides."""
    _check_free(out, force)
    texts = list(read_texts(dialogues))
    made = split_dialogues(texts, config)
    _write(out, made)
    held_out = sum(dialogue.split == "held_out" for dialogue in made)
    left_out = f"; {len(texts) - len(made)} without labels, or leaking, left out" if len(made) < len(texts) else ""
    typer.echo(f"{out}: {len(made) - held_out} train, {held_out} held-out{left_out}")
    if few := scarce(made):
        say(f"a split has too few examples to rank {', '.join(few)}: `labels check` counts them; split by another --by")


@labels_app.command()
def join(
    dialogues: Dialogues,
    labels: Annotated[Path, typer.Argument(metavar="LABELS", help="A .jsonl or .csv file with ids and labels.")],
    out: Out,
    force: Force = False,
) -> None:
    """Write rows with labels, weights, hard and covariates from another file, by id."""
    _check_free(out, force)
    made = join_labels(read_texts(dialogues), labels)
    _write(out, made)
    typer.echo(f"{out}: {len(made)} dialogues")


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise RunError(f"{out} is there already: choose another --out, or pass --force to replace it")


def _write(out: Path, dialogues: Sequence[Dialogue]) -> None:
    write_text(out, "".join(json.dumps(dialogue.to_row(), ensure_ascii=False) + "\n" for dialogue in dialogues))
