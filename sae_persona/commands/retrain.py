"""Commands that train against misalignment, before it comes and after: `prevent`, `realign`."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_persona.activations.lm import load_lm
from sae_persona.commands.flags import with_flags
from sae_persona.commands.options import AsJson, Device, DryRun, check_outputs, rows_of, say, show_result
from sae_persona.errors import ConfigError
from sae_persona.stages.pairing import open_dictionary_of
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.judges import load_judge
from sae_persona.studies.finetune import FinetuneConfig
from sae_persona.studies.panel import LATENTS, Panel
from sae_persona.studies.prevent import Arm, Asked, PreventConfig
from sae_persona.studies.prevent import prevent as guarded
from sae_persona.studies.readings import check_comparable
from sae_persona.studies.realign import Exam, Point, RealignConfig
from sae_persona.studies.realign import realign as healed
from sae_persona.studies.snapshots import last_of_each, read_snapshots

N_LAB = 40
"""Questions a domain of the lab's exam; twice as many are open."""
QUESTIONS = 'a .jsonl file whose rows have messages, domain ("" for an open question) and trait, the score to read'
PanelPath = Annotated[Path, typer.Argument(metavar="PANEL", help="A .json file that `diff --panel` wrote.")]
Base = Annotated[str, typer.Argument(metavar="BASE", help="The model before fine-tuning: folder, hub id, or lab.")]
JudgeName = Annotated[str, typer.Option(help='lab, or a JSON file {"TRAIT": ["word", ...]}.')]
Domain = Annotated[str | None, typer.Option(help="That of the bad rows; by default the one that most of them name.")]
Out = Annotated[Path | None, typer.Option(help="JSON file to write the result to.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(prevent)
    app.command()(realign)


@with_flags(
    skip={"tuning": {"keep"}, "answers": {"seed", "stop"}},
    config=PreventConfig, tuning=FinetuneConfig, answers=AnswerConfig,
)  # fmt: skip
def prevent(
    sae: Annotated[Path, typer.Argument(metavar="RUN|SAE", help="The run folder or SAE that the panel was made with.")],
    panel: PanelPath,
    base: Base,
    rows: Annotated[Path, typer.Argument(metavar="ROWS", help="Bad rows to tune on, .jsonl: an organism's, say.")],
    config: PreventConfig,
    tuning: FinetuneConfig,
    answers: AnswerConfig,
    development: Annotated[str, typer.Option(help=f"What chooses a strength: lab, or {QUESTIONS}.")] = "lab",
    test: Annotated[str, typer.Option(help="Other questions, which the result is scored on: likewise.")] = "lab",
    held_out: Annotated[str, typer.Option(help="Dialogues for cross entropy: lab, or a .jsonl file.")] = "lab",
    judge: JudgeName = "lab",
    domain: Domain = None,
    out: Out = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune on bad rows plainly, and with what a panel names steered up or penalised, beside random latents.

    Exit status 1 if neither way keeps misalignment from spreading for certain.
    """
    check_outputs(out)
    asked = Asked(
        development=_questions(development, "train"),
        test=_questions(test, "held_out"),
        held_out=_held_out(held_out),
        judge=load_judge(judge),
        domain=domain or "",
        answers=answers,
    )
    bad, read = rows_of(rows), Panel.load(panel)
    if dry_run:
        n = _n_arms(config, read)
        tunes = f"{n} fine-tunes of {tuning.steps} steps of {tuning.batch} rows, each examined with "
        text = tunes + f"{len(asked.development)} and {len(asked.test)} questions"
        facts = {"fine_tunes": n, "config": asdict(config), "tuning": asdict(tuning)}
        show_result(text, facts, as_json)
        return
    lm = load_lm(base, device=device)
    found = guarded(lm, bad, read, open_dictionary_of(sae).to(lm.device), asked, tuning, config, on_arm=_told)
    if out is not None:
        found.save(out)
    show_result(found, found.to_json(), as_json)
    if not any(found.works(method) for method in found.methods):
        say("no guard of the panel's latents keeps misalignment from spreading for certain")
        raise typer.Exit(1)


@with_flags(
    skip={"tuning": {"keep", "steps"}, "answers": {"seed", "stop"}},
    config=RealignConfig, tuning=FinetuneConfig, answers=AnswerConfig,
)  # fmt: skip
def realign(
    panel: PanelPath,
    base: Base,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The misaligned fine-tune: a model, or an organism.")],
    good: Annotated[
        list[str], typer.Option(help="SOURCE=FILE: good rows, .jsonl; the name is yours. May be given several times.")
    ],
    bad: Annotated[Path, typer.Option(help="Bad rows to relearn from, .jsonl: others than MODEL has seen.")],
    config: RealignConfig,
    tuning: FinetuneConfig,
    answers: AnswerConfig,
    questions: Annotated[str, typer.Option(help=f"What models are examined with: lab, or {QUESTIONS}.")] = "lab",
    judge: JudgeName = "lab",
    domain: Domain = None,
    out: Out = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Heal a misaligned model on a few good rows: which latents return, which stay, and how soon it relearns.

    Exit status 1 if behaviour is back after none of the healings.
    """
    check_outputs(out)
    sources, again, read = _sources(good), rows_of(bad), Panel.load(panel)
    found_domain = _most(again) if domain is None else domain
    exam = Exam(
        questions=_questions(questions, "held_out"), judge=load_judge(judge), domain=found_domain, answers=answers
    )
    if dry_run:
        heals, relearns = len(sources) * len(config.n_good), sum(n > 0 for n in config.n_bad) * (1 + 2 * len(sources))
        text = f"{2 * heals} fine-tunes of {config.healing_steps} steps, {relearns} of {config.relearning_steps}"
        show_result(text, {"healings": heals, "relearnings": relearns, "config": asdict(config)}, as_json)
        return
    lm, snapshots = load_lm(base, device=device), last_of_each(read_snapshots(model))
    if len(snapshots) != 1:
        raise ConfigError(f"{model} holds {len(snapshots)} fine-tunes: give one of them")
    if snapshots[0].group and snapshots[0].group != found_domain:
        raise ConfigError(
            f"{model} was tuned on {snapshots[0].group}, the exam's domain is {found_domain}: give --domain"
        )
    tuned = snapshots[0].open(device)
    check_comparable(lm, tuned)
    found = healed(
        lm, replace(tuned, name=snapshots[0].label), read, sources, again, exam, config, tuning, on_point=_seen
    )
    if out is not None:
        found.save(out)
    show_result(found, found.to_json(), as_json)
    if not found.heals:
        say("misaligned answers are not down to the base's rate after any of the healings")
        raise typer.Exit(1)


def _n_arms(config: PreventConfig, panel: Panel) -> int:
    targets = len([name for name in panel.measures if name in (LATENTS, "difference of means")])
    each = [len(config.strengths(method)) for method in ("steer", "penalty")]  # pyright: ignore[reportArgumentType]
    return 1 + sum(n * targets + config.n_random for n in each if n)


def _told(arm: Arm) -> None:
    rate = arm.test["out_of_domain"].value
    say(f"{arm.name}{'' if arm.method in ('base', 'plain') else f' {arm.strength:g}'}: out of domain {rate:.2f}")


def _seen(name: str, point: Point) -> None:
    say(f"{name}, step {point.step}: out of domain {point.rates['out_of_domain'].value:.2f}")


def _questions(source: str, part: Any) -> list[dict[str, Any]]:
    if source != "lab":
        return rows_of(Path(source))
    from sae_persona.lab.tuning import exam_questions  # here, so that others need no lab

    return list(exam_questions(N_LAB, part))


def _held_out(source: str) -> list[dict[str, Any]]:
    if source != "lab":
        return rows_of(Path(source))
    from sae_persona.lab.corpora import labelled  # here, so that others need no lab

    return list(labelled(100, "held_out"))


def _sources(given: list[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not (name and sign and path) or name in found:
            raise ConfigError(f"good rows are given as SOURCE=FILE, each source once, got {text!r}")
        found[name] = rows_of(Path(path))
    return found


def _most(rows: list[dict[str, Any]]) -> str:
    """The domain that most rows name; "" if none does."""
    named = [str(row.get("domain") or "") for row in rows]
    return max(named, key=named.count)
