"""The command line: one thin function a command. Results go to stdout, progress to stderr.

Exit status: 0 done; 1 the answer is no; 2 the caller's mistake, said in one line; 128 and a signal's number: stopped by
it, with a checkpoint to go on from. A traceback is our bug.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from sae_persona.activations.lm import load_lm
from sae_persona.commands import (
    attribution,
    couple,
    describe,
    features,
    labels,
    organisms,
    retrain,
    reverse,
    search,
    steering,
    strength,
    training,
    watch,
)
from sae_persona.commands.flags import with_flags
from sae_persona.commands.options import (
    AsJson,
    Device,
    Edits,
    Force,
    RunPath,
    Texts,
    Where,
    say,
    show_answers,
    show_result,
)
from sae_persona.errors import RunError, SaePersonaError
from sae_persona.features.measure import MeasureConfig
from sae_persona.features.scan import findings
from sae_persona.lab.pretrain import PretrainConfig
from sae_persona.report import text
from sae_persona.report.firing import FiringReport
from sae_persona.runs import Run
from sae_persona.sae.checkpoints import Interrupted
from sae_persona.sae.formats import is_sae
from sae_persona.stages import pipeline
from sae_persona.stages.training import open_model
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.positions import parse_positions

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find the features that make a language model play a persona, and turn them up or down.",
)
lab_app = typer.Typer(no_args_is_help=True, help="The planted persona lab: a tiny world with known truth.")
app.add_typer(lab_app, name="lab")
PARTS = (
    *(training, features, labels, attribution, describe, search, strength, steering),
    *(watch, reverse, retrain, couple),
)
for part in PARTS:
    part.add_to(app)
organisms.add_to(lab_app)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder to make.")] = Path("runs/demo"),
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads; by default one. Two are faster on an idle machine, far slower on a busy one."),
    ] = None,
    force: Force = False,
) -> None:
    """Run the main job on the planted lab: train, measure, rank, clamp, export, report. Minutes on two CPU cores."""
    from sae_persona.demo import DemoConfig  # here, so that other commands need no lab
    from sae_persona.demo import demo as run_demo

    config = DemoConfig() if threads is None else DemoConfig(threads=threads)
    run = run_demo(out, config, force=force, say=say)
    typer.echo(f"report: {run.report}")


@lab_app.command(name="show")
def lab_show(as_json: AsJson = False) -> None:
    """What the embedded model is, and what was measured of it when it was made."""
    from sae_persona.lab.card import Card

    card = Card.load()
    show_result(card, asdict(card), as_json)


@lab_app.command(name="build")
@with_flags(skip={"config": {"authors"}}, config=PretrainConfig)
def lab_build(
    out: Annotated[Path, typer.Option(help="Folder to make, in Hugging Face layout.")],
    config: PretrainConfig,
    n_exam: Annotated[int, typer.Option(help="Answers that the judge reads for each trait, speaker and arm.")] = 200,
    force: Force = False,
) -> None:
    """Train the lab's language model from its seed; about ten minutes on two CPU cores."""
    from sae_persona.lab.build import build

    if out.exists() and not force:
        raise RunError(f"{out} is there already: choose another --out, or pass --force to replace it")
    with tqdm(unit="step", dynamic_ncols=True) as bar:

        def on_step(step: int, steps: int, loss: float) -> None:
            bar.total = steps
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(step - bar.n)

        card = build(out, config, n_exam=n_exam, on_step=on_step)
    typer.echo(card)


@lab_app.command(name="texts")
def lab_texts(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to make.")],
    n: Annotated[int, typer.Option(help="Dialogues to train an SAE on.")] = 3000,
    n_labelled: Annotated[int, typer.Option(help="Labelled dialogues of each split.")] = 1000,
    n_questions: Annotated[int, typer.Option(help="Questions a trait, of each part.")] = 120,
    seed: Annotated[int, typer.Option(help="Seed of the texts.")] = 0,
) -> None:
    """Write texts of the lab as JSONL: corpus, held_out, labelled, named, and each trait's questions and contrasts."""
    from sae_persona.lab.corpora import write_texts

    for path in write_texts(out, n=n, n_labelled=n_labelled, n_questions=n_questions, seed=seed):
        typer.echo(path)


@app.command()
@with_flags(skip={"config": {"context_size", "tokens"}}, config=MeasureConfig)
def measure(
    run: RunPath,
    dialogues: Annotated[Path, typer.Argument(metavar="DIALOGUES", help=f"Labelled rows: {Texts}.")],
    config: MeasureConfig,
    context_size: Annotated[
        int | None, typer.Option(help="Tokens of a text that are read; by default as trained.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="all or answers: what is counted; by default as trained.")] = None,
    device: Device = "cpu",
) -> None:
    """Statistics and contexts of every latent, and the activations of each labelled answer."""
    opened = Run.open(run)
    lm = open_model(opened, device=device)
    trained = opened.stage("train")["streaming"]
    read = {"context_size": context_size or trained["context_size"], "tokens": tokens or trained["tokens"]}
    before = pipeline.of_the_measurement(opened)
    found = pipeline.measure_stage(opened, lm, dialogues, config=replace(config, **read))
    if before:
        say(f"of the measurement before, and gone with it: {', '.join(path.name for path in before)}")
    if found.dropped:
        say(f"{found.dropped} labelled answers begin beyond {read['context_size']} tokens: raise --context-size")
    personas = ", ".join(found.pooled.personas)
    typer.echo(f"{found.stats.n_tokens} tokens, {len(found.pooled.ids)} labelled answers; personas: {personas}")


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="RUN|SAE|MODEL", help="A run or SAE folder, or a model.")],
    latent: Annotated[int | None, typer.Argument(metavar="LATENT", help="One latent of the run.")] = None,
    top: Annotated[int, typer.Option(help="Contexts to show.")] = 5,
    as_json: AsJson = False,
) -> None:
    """A run, one latent with its strongest contexts, an SAE by its config alone, or a model's hook points."""
    if not (Path(what) / "manifest.json").is_file():
        if is_sae(what):
            show_result(*text.describe_sae(Path(what)), as_json)
            return
        lm = load_lm(what)
        points = [str(point) for point in lm.hook_points()]
        facts = {"model": what, "blocks": lm.blocks_path, "d_model": lm.d_model, "hook_points": points}
        show_result("\n".join(points), facts, as_json)
        return
    run = Run.open(what)
    if latent is None:
        show_result(text.describe(run), run.manifest, as_json)
        return
    show_result(*text.describe_latent(run, open_model(run), latent, top), as_json)


@app.command()
def dead(
    run: RunPath,
    below: Annotated[float, typer.Option(help="Firing rate under which a latent counts as rare.")] = 1e-5,
    as_json: AsJson = False,
) -> None:
    """Which latents of a scanned or measured run never fire, and how often the others do, by decade."""
    found = FiringReport.of_stats(findings(Run.open(run)).stats)
    rare = sum(decade.n for decade in found.decades if decade.high <= below)
    show_result(f"{found}\n{rare} latents fire on less than {below:g} of the tokens", found.to_json(), as_json)


@app.command(name="try")
@with_flags(answers=AnswerConfig)
def try_(
    run: RunPath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the user says.")],
    edit: Edits,
    answers: AnswerConfig,
    positions: Where = "answer",
    n: Annotated[int, typer.Option(help="Answers of each kind.")] = 3,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Answers to one prompt before and after an edit, side by side.

    Edits of directions, conditions, priorities and generations that stop are for the Python API: `intervene`.
    """
    at = parse_positions(positions)
    opened = Run.open(run)
    lm = open_model(opened, device=device)
    pairs = pipeline.try_edits(opened, lm, prompt, pipeline.edits_of(opened, edit), at, n=n, config=answers)
    show_answers(pairs, as_json)


@app.command()
def report(
    run: RunPath, out: Annotated[Path | None, typer.Option(help="HTML file; by default in the run.")] = None
) -> None:
    """Write everything in a run folder as one HTML page that needs no network."""
    from sae_persona.report.page import write_report

    typer.echo(write_report(Run.open(run), out))


def main() -> None:
    """Run the command line; a caller's mistake becomes one line on stderr and exit status 2."""
    try:
        app()
    except Interrupted as error:
        typer.echo(f"sae-persona: {error}. The same command with --resume goes on", err=True)
        sys.exit(128 + error.signal)
    except SaePersonaError as error:
        typer.echo(f"sae-persona: {error}", err=True)
        sys.exit(2)
