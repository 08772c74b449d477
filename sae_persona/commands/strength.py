"""Commands that set strengths: `sweep`, `strength`, `compose`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sae_persona.commands.flags import with_flags, words
from sae_persona.commands.options import AsJson, Device, Persona, RunPath, Texts, Where, say, show_result
from sae_persona.runs import Run
from sae_persona.stages import dosing, pipeline
from sae_persona.stages.training import open_model
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.compose import ComposeConfig
from sae_persona.steering.dial import DialConfig
from sae_persona.steering.divergence import DivergenceConfig
from sae_persona.steering.judges import load_judge
from sae_persona.steering.positions import parse_positions
from sae_persona.steering.solver import Targets
from sae_persona.steering.strength import Judge
from sae_persona.steering.sweep import SweepConfig

JudgeName = Annotated[
    str,
    typer.Option(
        help="lab; openai:MODEL@URL, a chat model whose key is in OPENAI_API_KEY; or a JSON file "
        '{"TRAIT": ["word", ...]}.'
    ),
]
Also = Annotated[str, typer.Option(metavar="A,B,...", help="Further traits that a chat model judges.")]
Rates = Annotated[list[str] | None, typer.Option(metavar="TRAIT=RATE", help="A target. May be given several times.")]
READING = {"batch"}  # of how divergence is read, what gets no flag


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(sweep)
    app.command()(strength)
    app.command()(compose)


def _judge(run: Run, name: str, traits: dict[str, str], also: str) -> Judge:
    """The judge of that name; what a chat model replies is kept in the run."""
    return load_judge(name, {**traits, **{word: word for word in words(also)}}, run.path / "replies.sqlite")


@with_flags(
    skip={
        "config": {"answers", "dial"},
        "dial": {"reading", "low", "high", "tolerance", "max_steps"},
        "reading": READING,
    },
    config=SweepConfig, answers=AnswerConfig, dial=DialConfig, reading=DivergenceConfig,
)  # fmt: skip
def sweep(
    run: RunPath,
    persona: Persona,
    development: Annotated[Path, typer.Argument(metavar="DEVELOPMENT", help="Questions that choose the strength.")],
    test: Annotated[Path, typer.Argument(metavar="TEST", help="Other questions, which the result is measured on.")],
    config: SweepConfig,
    answers: AnswerConfig,
    dial: DialConfig,
    reading: DivergenceConfig,
    judge: JudgeName = "lab",
    also: Also = "",
    meaning: Annotated[
        str | None, typer.Option(help="What the persona is, in words, for a chat model as judge; else its name.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="System message that asks for the persona.")] = None,
    held_out: Annotated[
        Path | None, typer.Option(help=f"Texts on which the arms' cross entropy is read: {Texts}.")
    ] = None,
    candidates: Annotated[int, typer.Option(help="Best-ranked latents to choose from.")] = 3,
    latent: Annotated[int | None, typer.Option(help="Clamp this latent, and choose only its strength.")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Strength against effect and cost, for a latent and everything that it has to beat."""
    opened = Run.open(run)
    rules = _judge(opened, judge, {persona: meaning or persona}, also)
    lm = open_model(opened, device=device)
    result = pipeline.sweep_stage(
        opened,
        lm,
        persona,
        development=pipeline.questions_of(development),
        test=pipeline.questions_of(test),
        judge=rules,
        config=replace(config, answers=answers, dial=replace(dial, reading=reading)),
        persona_prompt=prompt,
        held_out=held_out,
        n_candidates=candidates,
        latent=latent,
        on_arm=lambda arm: say(f"{arm.part} {arm.kind} {arm.strength or ''} rate {arm.rate.value:.2f}"),
    )
    show_result(result, result.to_json(), as_json)
    if not result.chosen.gain.low > 0:
        say(f"no strength within {config.max_cost:g} x perplexity raises {persona} for certain")
        raise typer.Exit(1)


@with_flags(skip={"config": {"reading"}, "reading": READING}, config=DialConfig, reading=DivergenceConfig)
def strength(
    run: RunPath,
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS", help=f"What the divergence is read on: {Texts}.")],
    edit: Annotated[
        list[str],
        typer.Option(
            help="clamp:LATENT (also pin, add, floor, ceiling), LATENT a number or a persona; or steer:PERSONA, the "
            "difference of means. May be given several times: each is dialled by itself."
        ),
    ],
    config: DialConfig,
    reading: DivergenceConfig,
    positions: Where = "answer",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Solve for the strength at which an edit moves the model by a KL budget, so that edits can be compared."""
    at = parse_positions(positions)
    opened = Run.open(run)
    lm = open_model(opened, device=device)
    dials = dosing.strength_stage(
        opened,
        lm,
        edit,
        pipeline.questions_of(questions),
        positions=at,
        config=replace(config, reading=reading),
    )
    text = "\n\n".join(f"{name}: {dial}" for name, dial in dials.items())
    show_result(text, {name: dial.to_json() for name, dial in dials.items()}, as_json)


@with_flags(skip={"reading": READING}, config=ComposeConfig, answers=AnswerConfig, reading=DivergenceConfig)
def compose(
    run: RunPath,
    development: Annotated[Path, typer.Argument(metavar="DEVELOPMENT", help="Questions that strengths are solved on.")],
    test: Annotated[Path, typer.Argument(metavar="TEST", help="Other questions, which the result is measured on.")],
    trait: Annotated[
        list[str],
        typer.Option(
            help="TRAIT, with the clamp that its sweep chose, or TRAIT=EDIT, such as formal=clamp:12=1.5. Two or more."
        ),
    ],
    config: ComposeConfig,
    answers: AnswerConfig,
    reading: DivergenceConfig,
    at_least: Rates = None,
    at_most: Rates = None,
    judge: JudgeName = "lab",
    also: Also = "",
    positions: Where = "answer",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """How the edits of several traits interfere; with targets, strengths that reach them at the least divergence.

    Exit status 1 where the targets are not met on TEST; how far each trait goes is told with it.
    """
    at = parse_positions(positions)
    opened = Run.open(run)
    floors, ceilings = dosing.parse_rates(at_least or ()), dosing.parse_rates(at_most or ())
    targets = Targets(at_least=floors, at_most=ceilings) if floors or ceilings else None
    named = {text.partition("=")[0] for text in trait} | floors.keys() | ceilings.keys()
    rules = _judge(opened, judge, {name: name for name in sorted(named)}, also)
    asked = dosing.Asked(
        development=pipeline.questions_of(development),
        test=pipeline.questions_of(test),
        judge=rules,
        answers=answers,
        reading=reading,
    )
    found = dosing.compose_stage(
        opened,
        open_model(opened, device=device),
        trait,
        asked,
        positions=at,
        targets=targets,
        config=config,
        on_round=lambda strengths, rates: say(f"{_listed(strengths)}: {_listed(rates)}"),
    )
    show_result(found, found.to_json(), as_json)
    if found.met is False:
        raise typer.Exit(1)


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
