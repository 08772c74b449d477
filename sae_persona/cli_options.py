"""What several commands share: options, and where their words go."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_persona.steering.positions import Positions

Texts = "a .txt (a text a line), .jsonl or .parquet file, a folder of such, a data set on disk, or hub:ORG/NAME[:SPLIT]"
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Persona = Annotated[str, typer.Argument(metavar="PERSONA", help="A persona that the measured labels name.")]
Where = Annotated[
    Positions, typer.Option(help="Tokens that are edited: answer (from the token before it), pre, generated or all.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that is at --out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


def say(text: str) -> None:
    """Tell of progress, on stderr."""
    typer.echo(text, err=True)


def show_result(text: object, value: Any, as_json: bool) -> None:
    """Print a result on stdout, for people or as JSON."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False) if as_json else str(text))
