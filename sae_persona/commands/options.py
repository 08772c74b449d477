"""What several commands share: options, and where their words go."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sae_persona.activations.texts import READERS
from sae_persona.errors import ConfigError, DataError

Texts = (
    "a .txt (a text a line), .jsonl, .parquet or .csv file, a folder of such, a data set on disk, "
    "hub:ORG/NAME[:SPLIT], evals:PATH[:answers] or axis:PATH"
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Persona = Annotated[str, typer.Argument(metavar="PERSONA", help="A persona that the measured labels name.")]
At = "answer (from the token before it), pre, generated, prompt, all, every (BOS too), or spans START:STOP,..."
Where = Annotated[str, typer.Option(help=f"Tokens that are edited: {At}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that is at --out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")]
Edits = Annotated[
    list[str],
    typer.Option(
        "--edit",
        help="OPERATION:LATENT=STRENGTH (clamp, pin, add, floor, ceiling), scale:LATENT=FACTOR or ablate:LATENT. "
        "LATENT is a number, or a persona that was ranked: its best rising latent. Strength 1 is the latent's 99.9th "
        "percentile, factor 1 changes nothing. May be given several times.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file. DataError if it is none, or empty."""
    if path.suffix != ".jsonl" or not path.is_file():
        raise DataError(f"rows are read from a .jsonl file, there is none at {path}")
    rows = [row for _, row in READERS[".jsonl"](path)]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} has no rows, or a line that is no object: give rows with messages")
    return rows  # pyright: ignore[reportReturnType]


def check_outputs(*paths: Path | None) -> None:
    """ConfigError for a file that cannot be written, before the work that would be lost."""
    for path in paths:
        if path is not None and path.is_dir():
            raise ConfigError(f"{path} is a folder: name a file to write")
        if path is not None and (above := next(one for one in path.absolute().parents if one.exists())).is_file():
            raise ConfigError(f"{path} cannot be written: {above} is a file")


def say(text: str) -> None:
    """Tell of progress, on stderr."""
    typer.echo(text, err=True)


def show_result(text: object, value: Any, as_json: bool) -> None:
    """Print a result on stdout, for people or as JSON."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False) if as_json else str(text))


def with_default(command: str) -> type[TyperGroup]:
    """A group in which that command is meant where none is named: `cache MODEL TEXTS` beside `cache verify STORE`."""

    class WithDefault(TyperGroup):
        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            if args and args[0] not in self.commands:
                args = [command, *args]
            return super().resolve_command(ctx, args)

    return WithDefault


def show_answers(pairs: Sequence[tuple[str, str]], as_json: bool) -> None:
    """Answers before and after an edit, side by side."""
    width = max(len(before) for before, _ in pairs)
    table = "\n".join(f"{before:{width}}  ->  {after}" for before, after in pairs)
    show_result(table, [{"before": before, "after": after} for before, after in pairs], as_json)
