"""Commands that compare checkpoints of a fine-tune, track a panel over them, and warn: `diff`, `track`, `predict`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_persona.activations.lm import LM, load_lm
from sae_persona.activations.stream import StreamConfig
from sae_persona.attribution.contrasts import read_contrasts
from sae_persona.commands.flags import with_flags
from sae_persona.commands.options import AsJson, Device, DryRun, Texts, check_outputs, say, show_result, with_default
from sae_persona.errors import ConfigError, DataError
from sae_persona.report.tracking import write_track
from sae_persona.runs import Run
from sae_persona.sae.formats import is_sae, load_sae, save_sae
from sae_persona.sae.model import SAE
from sae_persona.studies.alarm import check_number
from sae_persona.studies.diff import DiffConfig
from sae_persona.studies.diff import diff as compare
from sae_persona.studies.fit import RefitConfig, drifted_batches
from sae_persona.studies.fit import refit as train_on
from sae_persona.studies.panel import Panel, PanelConfig, choose_panel, made_of
from sae_persona.studies.predict import PredictConfig
from sae_persona.studies.predict import predict as foresee
from sae_persona.studies.readings import Prompt, Reading, check_comparable, read_prompted, read_prompts
from sae_persona.studies.rows import RowsConfig, screen_rows
from sae_persona.studies.snapshots import Snapshot, last_of_each, read_snapshots
from sae_persona.studies.track import Scored, Track, TrackConfig, track_unseen
from sae_persona.studies.track import track as follow

Checkpoints = "organism folders, folders of them, checkpoints, or .csv and .jsonl lists of checkpoints"
SaePath = Annotated[Path, typer.Argument(metavar="RUN|SAE", help="A run folder, or an SAE of the base model.")]
Base = Annotated[str, typer.Argument(metavar="BASE", help="The model before fine-tuning: folder, hub id, or lab.")]
PanelPath = Annotated[Path, typer.Argument(metavar="PANEL", help="A .json file that `diff --panel` wrote.")]
Organisms = Annotated[list[str], typer.Argument(metavar="ORGANISM...", help=f"Fine-tunes: {Checkpoints}.")]
Prompts = Annotated[Path, typer.Option(help=f"What every model is asked: {Texts}.")]
Out = Annotated[Path | None, typer.Option(help="JSON file to write the result to.")]
Benign = Annotated[
    list[str] | None,
    typer.Option(help=f"Harmless fine-tunes: {Checkpoints}, or a quoted pattern of such. May be given several times."),
]
Page = Annotated[Path | None, typer.Option(help="HTML file to draw score against behaviour in.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(diff)
    app.add_typer(track_app, name="track")
    app.add_typer(predict_app, name="predict")


@with_flags(config=DiffConfig, panel_config=PanelConfig, refitting=RefitConfig)
def diff(
    sae: SaePath,
    base: Base,
    tuned: Annotated[list[str], typer.Argument(metavar="TUNED...", help=f"Fine-tunes of it: {Checkpoints}.")],
    prompts: Prompts,
    config: DiffConfig,
    panel_config: PanelConfig,
    refitting: RefitConfig,
    pairs: Annotated[
        Path | None, typer.Option(help="Contrast pairs, bad answer and good, for attribution within each model.")
    ] = None,
    all_steps: Annotated[
        bool, typer.Option("--all-steps", help="Every checkpoint of an organism, not only its last.")
    ] = False,
    panel: Annotated[Path | None, typer.Option(help="Write a panel (.json), chosen on TUNED and --benign.")] = None,
    benign: Benign = None,
    latent: Annotated[
        list[str] | None, typer.Option(help="For --panel: this latent, not chosen ones; -N if it falls. Repeatable.")
    ] = None,
    refit: Annotated[Path | None, typer.Option(help=f"First train the SAE on, on all these models: {Texts}.")] = None,
    refit_out: Annotated[Path | None, typer.Option(help="Folder for the SAE that --refit made.")] = None,
    out: Out = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """What fine-tunes did to a model, in the latents of an SAE: shifts, attribution, dense directions; a panel of them.

    Exit status 1 if no latent moved beyond chance.
    """
    check_outputs(out, panel)
    if panel is None and (benign or latent):
        raise ConfigError("--benign and --latent choose a panel: say where with --panel FILE.json")
    if panel is not None and panel.suffix != ".json":
        raise ConfigError(f"a panel is written to a .json file, got {panel}")
    if (refit_out is not None) and refit is None:
        raise ConfigError("--refit-out is for what --refit TEXTS makes: give both")
    signed, asked = _signed(latent or []), read_prompts(prompts)
    contrasts = [] if pairs is None else read_contrasts(pairs)
    snapshots, calm = _snapshots(tuned, every=all_steps), _snapshots(benign or [])
    if panel is not None:
        _check_sides(snapshots, calm)
    if dry_run:
        _plan(as_json, prompts=[one.id for one in asked], tuned=snapshots, benign=calm)
        return
    lm, opened = load_lm(base, device=device), _open_sae(sae)
    opened.check_width(lm.d_model)
    opened = opened.to(lm.device)
    if refit is not None:
        opened = _refitted(opened, lm, snapshots, sae, refit, refitting)
        if refit_out is not None:
            save_sae(opened, refit_out)
    found = compare(lm, snapshots, opened, asked, config, contrasts=contrasts)
    chosen = None
    if panel is not None:
        chosen = _panel(lm, opened, asked, last_of_each(snapshots), calm, panel_config, signed, config.batch)
    if out is not None:
        found.save(out)
    text, value = str(found), found.to_json()
    if chosen is not None and panel is not None:
        text, value = f"{text}\n\n{chosen}\n{chosen.save(panel)}", value | {"panel": str(panel)}
    show_result(text, value, as_json)
    if not any(one.n_rose + one.n_fell for one in found.tuned):
        say("no latent moved beyond chance at 5 % (max-T)")
        raise typer.Exit(1)


track_app = typer.Typer(
    cls=with_default("panel"),
    no_args_is_help=True,
    help="Read a frozen panel over checkpoints: `track PANEL ORGANISM...`; or choose it anew, leaving out a group at a "
    "time: `track unseen RUN|SAE BASE ORGANISM... --prompts FILE`.",
)


@track_app.command(name="panel")
@with_flags(config=TrackConfig)
def track_panel(
    panel: PanelPath, organisms: Organisms, config: TrackConfig, out: Out = None, page: Page = None,
    device: Device = "cpu", dry_run: DryRun = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Score checkpoints with a panel, and hold the scores against judged behaviour.

    Exit status 1 if it does not tell misaligned fine-tunes from aligned ones.
    """
    check_outputs(out, page)
    loaded, snapshots = Panel.load(panel), _snapshots(organisms, every=True)
    if dry_run:
        _plan(as_json, prompts=loaded.keys, checkpoints=snapshots)
        return
    _finish(follow(loaded, snapshots, config, device=device, on_each=_told), out, page, as_json)


@track_app.command(name="unseen")
@with_flags(config=TrackConfig, panel_config=PanelConfig)
def unseen(
    sae: SaePath, base: Base, organisms: Organisms, prompts: Prompts, config: TrackConfig, panel_config: PanelConfig,
    out: Out = None, page: Page = None, device: Device = "cpu", dry_run: DryRun = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Choose a panel on all groups but one, score that one, and so on: AUROC on unseen fine-tunes.

    Exit status 1 if it does not tell misaligned fine-tunes from aligned ones.
    """
    check_outputs(out, page)
    asked, snapshots = read_prompts(prompts), _snapshots(organisms, every=True)
    if dry_run:
        _plan(as_json, prompts=[one.id for one in asked], checkpoints=snapshots)
        return
    lm, opened = load_lm(base, device=device), _open_sae(sae)
    opened.check_width(lm.d_model)
    _finish(track_unseen(lm, opened, asked, snapshots, config, panel_config), out, page, as_json)


predict_app = typer.Typer(
    cls=with_default("alarm"),
    no_args_is_help=True,
    help="Set an alarm on benign fine-tunes and see when it fires: `predict PANEL --benign ORG ORG...`; score training "
    "rows before training: `predict rows PANEL MODEL ROWS`.",
)


@predict_app.command(name="alarm")
@with_flags(config=PredictConfig, tracking=TrackConfig)
def alarm(
    panel: PanelPath, organisms: Organisms, config: PredictConfig, tracking: TrackConfig, benign: Benign = None,
    out: Out = None, device: Device = "cpu", dry_run: DryRun = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """The step and dose at which the panel's alarm fires, and those at which behaviour leaves its baseline interval.

    Exit status 1 if it fires first in no series.
    """
    check_outputs(out)
    loaded = Panel.load(panel)
    if config.measure not in loaded.measures:
        raise ConfigError(f"the panel does not measure {config.measure!r}: it has {', '.join(loaded.measures)}")
    calm, snapshots = _snapshots(benign or [], every=True), _snapshots(organisms, every=True)
    if not calm:
        raise DataError("without benign fine-tunes there is no alarm threshold: give them with --benign")
    _check_calm(loaded, calm, config.alpha, tracking.misaligned_above)
    if dry_run:
        _plan(as_json, prompts=loaded.keys, benign=calm, checkpoints=snapshots)
        return
    scored = {
        name: follow(loaded, part, tracking, device=device, on_each=_told).rows
        for name, part in (("benign", calm), ("others", snapshots))
    }
    found = foresee(scored["benign"], scored["others"], config)
    if out is not None:
        found.save(out)
    show_result(found, found.to_json(), as_json)
    if not found.n_leads:
        say("the alarm fires before behaviour leaves its baseline interval in no series")
        raise typer.Exit(1)


@predict_app.command(name="rows")
@with_flags(config=RowsConfig)
def rows(
    panel: PanelPath,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that would be trained.")],
    data: Annotated[Path, typer.Argument(metavar="ROWS", help=f"What it would be trained on: {Texts}.")],
    config: RowsConfig,
    reference: Annotated[
        Path | None, typer.Option(help="Rows that are known to be good, in place of the model's own answers.")
    ] = None,
    out: Out = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Score training rows before training.

    Exit status 1 if rows say which are bad, and the panel does not find them.
    """
    check_outputs(out)
    found = screen_rows(Panel.load(panel), load_lm(model, device=device), data, config, reference=reference)
    if out is not None:
        found.save(out)
    show_result(found, found.to_json(), as_json)
    area = next(iter(found.auroc.values()), None)
    if area is not None and not area.low > 0.5:
        say("the panel does not tell bad rows from others for certain")
        raise typer.Exit(1)


def _snapshots(sources: Sequence[str], *, every: bool = False) -> list[Snapshot]:
    found = [one for source in sources for one in read_snapshots(source)]
    return found if every else last_of_each(found)


def _plan(as_json: bool, **parts: Sequence[str | Snapshot]) -> None:
    """What would be read."""
    named = {name: [one if isinstance(one, str) else one.label for one in part] for name, part in parts.items()}
    said = [
        f"{name}: {len(part)}, {', '.join(part[:3])}{', ...' if len(part) > 3 else ''}" for name, part in named.items()
    ]
    show_result("\n".join(line.removesuffix(", ") for line in said), named, as_json)


def _check_sides(tuned: Sequence[Snapshot], calm: Sequence[Snapshot]) -> None:
    """Whoever chooses a panel is on one side: a shell writes --benign DIR/* as one benign and many others."""
    if lost := [one.name for one in tuned if one.benign and one.family != "base"]:
        raise ConfigError(f"{lost[0]} is benign and given as TUNED: give it with --benign, and quote a pattern there")
    if both := {one.name for one in tuned} & {one.name for one in calm}:
        raise ConfigError(f"{min(both)} is given as TUNED and as --benign: give it once")


def _check_calm(panel: Panel, calm: Sequence[Snapshot], alpha: float, above: float) -> None:
    """What an alarm is set on, before anything is read."""
    if bad := [one for one in calm if one.is_misaligned(above)]:
        raise DataError(
            f"{bad[0].label} is judged misaligned ({bad[0].misaligned.value:.2f}): it cannot set an alarm as benign"
        )
    if seen := sorted({one.name for one in calm} & panel.chosen_on):
        raise DataError(f"{seen[0]} chose the panel, so it cannot set the alarm: give other benign fine-tunes")
    paths = [Path(str(one.model)).resolve() for one in last_of_each(calm)]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise DataError(f"{twice[0]} is given as several benign fine-tunes: give each once")
    check_number(len(paths), alpha)


def _open_sae(folder: Path) -> SAE:
    return load_sae(folder if is_sae(folder) else Run.open(folder).sae)


def _told(row: Scored) -> None:
    name, score = next(iter(row.scores.items()))
    say(f"{row.name}{'' if row.step is None else f' @ {row.step}'}: {name} {score.value:+.2f}")


def _finish(found: Track, out: Path | None, page: Path | None, as_json: bool) -> None:
    if out is not None:
        found.save(out)
    if page is not None:
        write_track(found, page)
    show_result(found, found.to_json(), as_json)
    first = found.telling[0]
    if first.n_misaligned and first.n_aligned and not first.auroc.low > 0.5:
        say(f"{first.measure} do not tell misaligned fine-tunes from aligned ones for certain")
        raise typer.Exit(1)


def _signed(latents: Sequence[str]) -> dict[int, int]:
    """Latents with their signs: "12" rises, "-12" falls."""
    try:
        return {abs(int(text)): -1 if text.startswith("-") else 1 for text in latents}
    except ValueError:
        raise ConfigError(f"a latent is a number, got {', '.join(latents)}") from None


def _refitted(sae: SAE, lm: LM, tuned: Sequence[Snapshot], folder: Path, texts: Path, config: RefitConfig) -> SAE:
    trained: dict[str, Any] = {} if is_sae(folder) else Run.open(folder).stage("train")["streaming"]
    read: dict[str, Any] = {"context_size": min(StreamConfig.context_size, lm.n_positions or StreamConfig.context_size)}
    read |= {name: trained[name] for name in ("context_size", "tokens") if name in trained}
    streaming = StreamConfig(**read)
    models = [Snapshot(name=lm.name, model=lm), *tuned]
    batches = drifted_batches(models, sae.hook, texts, streaming, config.refit_steps, device=str(lm.device))
    made = train_on(sae, batches, config)
    turned = (made.cosine < 0.9).float().mean().item()
    say(f"trained the SAE on: {turned:.1%} of the decoder directions turned past a cosine of 0.9")
    return made.sae.to(lm.device)


def _panel(
    lm: LM, sae: SAE, asked: Sequence[Prompt], bad: Sequence[Snapshot], calm: Sequence[Snapshot], config: PanelConfig,
    latents: dict[int, int], batch: int,
) -> Panel:  # fmt: skip
    def read(one: Snapshot) -> Reading:
        tuned = one.open(str(lm.device))
        check_comparable(lm, tuned)
        found = read_prompted(tuned, sae.hook, asked, batch=batch)
        return Reading(one.name, found.keys, found.x)

    before = read_prompted(lm, sae.hook, asked, batch=batch)
    tuned, benign = ([read(one) for one in part] for part in (bad, calm))
    return choose_panel(sae, sae.hook, asked, before, tuned, benign, config, latents=latents or None, about=made_of(lm))
