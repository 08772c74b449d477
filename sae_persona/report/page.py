"""A run folder as one HTML page: the result first, then each persona, the SAE, and how it was all made.

The page needs no network, no script and no font. The same run gives the same bytes.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sae_persona.errors import FormatError
from sae_persona.features.contexts import TopContexts
from sae_persona.features.files import reading_h5
from sae_persona.features.scan import KIND
from sae_persona.features.stats import LatentStats
from sae_persona.report import charts, curves, numbers, verdict
from sae_persona.report.firing import FiringReport, firing_chart
from sae_persona.report.persona import PersonaView, gather
from sae_persona.runs import Run, file_hash, read_json, write_text

_HERE = Path(__file__).parent


def write_report(run: Run, out: Path | None = None) -> Path:
    """Write what a run holds as one HTML file, whole or not at all: ``report.html`` in the run, or ``out``.

    What the run does not have is left out, with the command that makes it. RunError if nothing was trained in it;
    ModelError if there are contexts to show and the model, whose tokenizer they need, is not there any more.
    """
    run.stage("train")
    out = out or run.report
    write_text(out, render(run))
    return out


def render(run: Run) -> str:
    """The page as a string."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = (
        "number",
        "signed",
        "fixed",
        "percent",
        "points",
        "times",
        "strength",
        "z_score",
        "p_value",
        "with_interval",
    )
    environment.filters.update({name: getattr(numbers, name) for name in shown})
    environment.filters["quoted"] = shlex.quote
    personas = _personas(run)
    page = environment.get_template("page.html")
    return page.render(
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        run=run,
        path=shlex.quote(str(run.path)),
        manifest=run.manifest,
        manifest_json=json.dumps(run.manifest, indent=1),
        trained=run.stage("train"),
        measured=_latest(run, "measure"),
        personas=personas,
        headline=verdict.headline(
            [view.ranking for view in personas if view.ranking], [view.swept for view in personas if view.swept]
        ),
        quality=read_json(run.quality, "quality") if run.quality.is_file() else None,
        training=_training(run),
        firing=_firing(run),
        sae_hash=file_hash(run.sae) if run.sae.is_dir() else None,
        charts=charts,
        curves=curves,
        verdict=verdict,
    )


def _latest(run: Run, stage: str) -> dict[str, Any] | None:
    entries = [entry for entry in run.manifest["stages"] if entry["stage"] == stage]
    return entries[-1] if entries else None


def _personas(run: Run) -> list[PersonaView]:
    """The personas, with the contexts of their latents where the run has them."""
    path, kind = (run.scan, KIND) if run.scan.is_file() else (run.latents, "latents")
    if not path.is_file():
        return gather(run, None, None)
    if not any((run.path / folder).is_dir() for folder in ("rankings", "sweeps")):
        return []
    from sae_persona.stages.training import open_model  # here: the page is imported without what reads a model

    with reading_h5(path, kind) as file:
        contexts = TopContexts.from_h5(file["contexts"])
    return gather(run, contexts, open_model(run).tokenizer)


def _firing(run: Run) -> Markup | None:
    """How often the latents of a measured run fire."""
    if not run.latents.is_file():
        return None
    with reading_h5(run.latents, "latents") as file:
        return firing_chart(FiringReport.of_stats(LatentStats.from_h5(file["stats"])))


def _training(run: Run) -> list[Markup]:
    """Loss, FVU, L0 and dead share by tokens seen; those that were logged."""
    if not run.metrics.is_file():
        return []
    try:
        steps = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines() if line.strip()]
        drawn = [
            charts.training_curve(steps, "loss", "loss, log scale", log=True),
            charts.training_curve(steps, "fvu", "FVU, log scale", log=True),
            charts.training_curve(steps, "l0", "L0: latents a token"),
            charts.training_curve(steps, "dead", "dead latents"),
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
        raise FormatError(f"{run.metrics} is not a log of training steps ({error}): train again") from error
    return [chart for chart in drawn if chart]
