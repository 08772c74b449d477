"""Commands about the whole dictionary of features: `scan`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from sae_persona.activations.lm import checked_device
from sae_persona.activations.store import DTYPES
from sae_persona.commands.flags import with_flags
from sae_persona.commands.options import AsJson, Device, DryRun, Texts, show_result, with_default
from sae_persona.errors import ConfigError
from sae_persona.features.scan import Scan, ScanConfig, Share
from sae_persona.report.firing import FiringReport
from sae_persona.runs import Run
from sae_persona.stages import pipeline
from sae_persona.stages.training import open_model

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]

scan_app = typer.Typer(
    cls=with_default("corpus"),
    no_args_is_help=True,
    help="What every latent does in a corpus: `scan RUN TEXTS`; parts of it by several processes: "
    "`scan RUN TEXTS --share 0/2 --out PART`, `scan merge RUN PART...`.",
)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(scan_app, name="scan")


@scan_app.command(name="corpus")
@with_flags(skip={"config": {"context_size", "tokens"}}, config=ScanConfig)
def scan_corpus(
    run: RunPath,
    texts: Annotated[Path, typer.Argument(metavar="TEXTS", help=f"What the model reads: {Texts}.")],
    config: ScanConfig,
    context_size: Annotated[int | None, typer.Option(help="Tokens a sequence; by default as trained.")] = None,
    tokens: Annotated[str | None, typer.Option(help="all or answers: what is counted; by default as trained.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's; by default as trained.")] = None,
    share: Annotated[
        str | None,
        typer.Option(metavar="RANK/WORLD", help="Only every WORLD-th text, from the RANK-th on; needs --out."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for a share; all texts go to scan.h5 in the run.")] = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Rates, moments, quantiles, contexts and co-firing of every latent in a corpus, in one pass, into scan.h5."""
    opened = Run.open(run)
    trained = opened.stage("train")
    dtype = dtype or trained["dtype"]
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    streaming, training = trained["streaming"], trained["training"]
    read: Any = {"context_size": context_size or streaming["context_size"], "tokens": tokens or streaming["tokens"]}
    config = replace(config, **read)
    part = None if share is None else Share.parse(share)
    if dry_run:
        memory = config.memory(training["n_latents"])
        lines = [f"{size / 1e6:10,.0f} MB  {name}" for name, size in memory.items()]
        where = out or opened.scan
        lines.append(
            f"{training['n_latents']} latents at {trained['hook']} of {trained['model']['name']}, into {where}"
        )
        show_result("\n".join(lines), {"bytes": memory, "out": str(where)}, as_json)
        return
    checked_device(device)
    lm = open_model(opened, device=device, dtype=DTYPES[dtype])
    with tqdm(unit="token", unit_scale=True, total=config.limit_tokens, dynamic_ncols=True) as bar:
        found = pipeline.scan_stage(opened, lm, texts, config=config, share=part, out=out, on_rows=bar.update)
    _show(found, out or opened.scan, as_json)


@scan_app.command(name="merge")
def scan_merge(
    run: RunPath,
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Files of all shares of one corpus.")],
    as_json: AsJson = False,
) -> None:
    """Merge scans of all shares of a corpus into the run's scan.h5: what one pass would have found."""
    opened = Run.open(run)
    _show(pipeline.merge_stage(opened, parts), opened.scan, as_json)


def _show(found: Scan, path: Path, as_json: bool) -> None:
    report = FiringReport.of_stats(found.stats)
    facts = {
        "path": str(path),
        **report.to_json(),
        "cofiring_tokens": found.cofiring.n,
        "shares": found.about["shares"],
    }
    show_result(f"{report}\n{path}: contexts, and what fires together on {found.cofiring.n} tokens", facts, as_json)
