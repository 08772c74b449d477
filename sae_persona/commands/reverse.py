"""Commands that undo misalignment by editing latents, and bring it about: `reverse`, `induce`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_persona.activations.dialogues import Dialogue
from sae_persona.activations.lm import LM, load_lm
from sae_persona.activations.texts import read_texts
from sae_persona.commands.flags import with_flags
from sae_persona.commands.options import AsJson, Device, DryRun, Texts, check_outputs, say, show_result
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.measure import check_measured
from sae_persona.features.scan import findings
from sae_persona.report.reversal import write_certificate
from sae_persona.runs import Run
from sae_persona.sae.formats import is_sae, load_sae
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.export.native import write as write_intervention
from sae_persona.steering.judges import load_judge
from sae_persona.steering.strength import Judge
from sae_persona.studies.battery import Question, Variant
from sae_persona.studies.bounds import Bounds
from sae_persona.studies.candidates import MODES, Candidate, MeasuredSAE
from sae_persona.studies.certificate import Certificate
from sae_persona.studies.exams import read_questions
from sae_persona.studies.induce import InduceConfig
from sae_persona.studies.induce import induce as dose_curve
from sae_persona.studies.lab_case import SMALL, SMALL_CASE, organism_case
from sae_persona.studies.minimal_set import SearchConfig
from sae_persona.studies.organisms import Organism
from sae_persona.studies.reversal_arms import IN, OPEN, OUT, STANDARD
from sae_persona.studies.reverse import Case, ReverseConfig
from sae_persona.studies.reverse import reverse as find_reversal
from sae_persona.studies.rivals import own_stats
from sae_persona.studies.snapshots import last_of_each, read_snapshots
from sae_persona.types import HookPoint

CORE = (IN, OUT, OPEN)
RUNS = "Run folders, or SAEs of the base model, one a hook point."
SaePaths = Annotated[list[Path], typer.Argument(metavar="RUN|SAE...", help=RUNS)]
Base = Annotated[str, typer.Argument(metavar="BASE", help="The model before fine-tuning: folder, hub id, or lab.")]
JudgeName = Annotated[
    str,
    typer.Option(help='lab; openai:MODEL@URL or hf:MODEL, a chat model; or a JSON file {"TRAIT": ["word", ...]}.'),
]
Trait = Annotated[
    str, typer.Option(help="The judge's score that is 1 where an answer is misaligned, for rows without.")
]
Meaning = Annotated[str | None, typer.Option(help="What the trait is, in words, for a chat model as judge.")]
Domain = Annotated[str, typer.Option(help="What the model was tuned on, as questions name it.")]
Rows = "rows of a .jsonl file with messages, domain (none where open) and trait"
Out = Annotated[Path | None, typer.Option(help="JSON file to write the result to.")]
NESTED = {"search", "bounds", "induce", "answers"}
ANSWERS = {"batch"}


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(reverse)
    app.command()(induce)


@with_flags(
    skip={"config": NESTED, "answers": ANSWERS},
    config=ReverseConfig, search=SearchConfig, bounds=Bounds, inducing=InduceConfig, answers=AnswerConfig,
)  # fmt: skip
def reverse(
    saes: SaePaths,
    base: Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tune: an organism's folder, or a model.")],
    config: ReverseConfig,
    search: SearchConfig,
    bounds: Bounds,
    inducing: InduceConfig,
    answers: AnswerConfig,
    lab: Annotated[
        bool, typer.Option("--lab", help="TUNED is an organism of the lab: questions, rows and judge are the lab's.")
    ] = False,
    small: Annotated[
        bool, typer.Option("--small", help="With --lab: few questions and tries, to see how it goes.")
    ] = False,
    development: Annotated[Path | None, typer.Option(help=f"What the edit is chosen on: {Rows}.")] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help=f"Other questions, which the edit is tested on, each file a variant. Of a full reversal: "
            f"{', '.join(STANDARD[:5])}; the first three are misalignment itself. May be given several times.",
        ),
    ] = None,
    judge: JudgeName = "lab",
    trait: Trait = "",
    meaning: Meaning = None,
    domain: Domain = "",
    further: Annotated[
        list[str] | None,
        typer.Option(
            metavar="good|bad=FILE", help=f"Rows to train TUNED on before it is tested again: {Texts}. Repeatable."
        ),
    ] = None,
    held_out: Annotated[Path | None, typer.Option(help=f"Texts on which cross entropy is read: {Texts}.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A system message that asks for good answers, as a rival.")] = None,
    with_induce: Annotated[
        bool, typer.Option("--induce/--no-induce", help="Clamp the latents up in BASE, too.")
    ] = True,
    out: Out = None,
    page: Annotated[Path | None, typer.Option(help="HTML file to write the certificate to.")] = None,
    save_edit: Annotated[Path | None, typer.Option(help="Intervention file (.json) to write the edit to.")] = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """The fewest latents whose edit undoes what misaligned a fine-tune, and a certificate of what that is worth.

    Exit status 1 if it is not reversed.
    """
    check_outputs(out, page, save_edit)
    if small and not lab:
        raise ConfigError("--small scales the lab's questions down: give --lab, too")
    if small and (config, search, inducing, answers) != (
        ReverseConfig(),
        SearchConfig(),
        InduceConfig(),
        AnswerConfig(),
    ):
        raise ConfigError("--small brings its own search and answers: leave --small out to set them")
    if save_edit is not None and save_edit.suffix != ".json":
        raise ConfigError(f"an intervention file ends in .json, got {save_edit}")
    nested = {"search": search, "bounds": bounds, "answers": replace(answers, batch=256)}
    config = replace(config, **nested, induce=inducing if with_induce else None)
    if lab:
        _only_lab(development, test, further, held_out, prompt, domain)
        case = organism_case(Organism.load(tuned), SMALL_CASE if small else None)
        config = replace(SMALL, bounds=bounds, induce=SMALL.induce if with_induce else None) if small else config
    else:
        case = _case(
            development, test or [], further or [], held_out, prompt, domain, _judge(judge, trait, meaning), trait
        )
    if dry_run:
        show_result(*_planned(saes, base, tuned, case, config), as_json)
        return
    lm, sites = load_lm(base, device=device), [_site(path, device) for path in saes]
    found = find_reversal(lm, _tuned(tuned, device), sites, case, config, say=say)
    certificate = found.certificate
    if out is not None:
        certificate.save(out)
    if page is not None:
        write_certificate(certificate, page)
    if save_edit is not None:
        write_intervention(found.intervention, save_edit)
    show_result(certificate, certificate.to_json(), as_json)
    if not certificate.is_reversed:
        say(f"{certificate.tuned} is {certificate.verdict}, see the bounds that are not met")
        raise typer.Exit(1)


@with_flags(skip={"answers": ANSWERS}, config=InduceConfig, answers=AnswerConfig)
def induce(
    saes: SaePaths,
    base: Base,
    certificate: Annotated[
        Path, typer.Argument(metavar="CERTIFICATE", help="What `reverse --out` wrote: its latents are clamped up.")
    ],
    config: InduceConfig,
    answers: AnswerConfig,
    questions: Annotated[Path, typer.Option(help=f"What the base is asked: {Rows}.")],
    judge: JudgeName = "lab",
    trait: Trait = "",
    meaning: Meaning = None,
    out: Out = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """The latents of a reversal clamped up in the base model: does that misalign it, and at which dose?

    Exit status 1 if it does not for certain, and beyond what random latents do.
    """
    check_outputs(out)
    made, rules = Certificate.load(certificate), _judge(judge, trait, meaning)
    asked = read_questions(questions, trait=trait)
    lm, sites = load_lm(base, device=device), [_site(path, device) for path in saes]
    latents = [
        Candidate(HookPoint.parse(one.hook), one.latent, one.rise, one.unit, one.base_act, one.tuned_act)
        for one in made.edits
    ]
    by_hook = {site.hook: _measured(site, lm, asked, answers) for site in sites}
    if missing := [one.hook for one in latents if one.hook not in by_hook]:
        raise ConfigError(f"the certificate edits latents at {missing[0]}: give the SAE of that hook point, too")
    found = dose_curve(
        lm, by_hook, latents, asked, rules, config,
        domain=made.domain, answers=replace(answers, batch=256),
        on_dose=lambda one: say(f"dose {one.dose:g}: {one.gain.value:+.2f} misaligned"),
    )  # fmt: skip
    if out is not None:
        found.save(out)
    show_result(found, found.to_json(), as_json)
    if not found.induces:
        say("no dose misaligns for certain, and beyond what random latents do")
        raise typer.Exit(1)


def _only_lab(*given: Any) -> None:
    if any(given):
        raise ConfigError("--lab brings its own questions, rows, texts and prompt: give either it or those")


def _judge(name: str, trait: str, meaning: str | None) -> Judge:
    return load_judge(name, {trait: meaning or trait} if trait else None)


def _case(
    development: Path | None,
    tests: Sequence[str],
    further: Sequence[str],
    held_out: Path | None,
    prompt: str | None,
    domain: str,
    judge: Judge,
    trait: str,
) -> Case:
    if development is None or not tests:
        raise ConfigError("give --development FILE and --test NAME=FILE, or --lab for an organism of the lab")
    named = _named(tests, "--test NAME=FILE")
    core = [name for name in named if name in CORE] or list(named)[:1]
    variants = [
        Variant(name=name, questions=read_questions(path, trait=trait), core=name in core)
        for name, path in named.items()
    ]
    return Case(
        development=read_questions(development, trait=trait),
        variants=variants,
        judge=judge,
        domain=domain,
        further={name: _rows(path) for name, path in _named(further, "--further good|bad=FILE").items()},
        held_out=held_out,
        prompt=prompt,
    )


def _rows(path: str) -> list[dict[str, Any]]:
    """Dialogues as rows. DataError for plain texts, of which nobody could learn how to answer."""
    found = []
    for number, text in enumerate(read_texts(path)):
        if not isinstance(text, Dialogue):
            raise DataError(f"{path}: row {number} is a plain text, further training needs dialogues with answers")
        found.append(text.to_row())
    return found


def _named(pairs: Sequence[str], form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, given, value = pair.partition("=")
        if not given or not name or not value or name in found:
            raise ConfigError(f"{form}, each name once, got {pair!r}")
        found[name] = value
    return found


def _site(path: Path, device: str) -> MeasuredSAE:
    if is_sae(path):
        return MeasuredSAE(load_sae(path).to(device))
    run = Run.open(path)
    sae = load_sae(run.sae)
    if run.scan.is_file() or run.latents.is_file():
        if not run.scan.is_file():
            check_measured(run, sae)
        return MeasuredSAE(sae.to(device), findings(run).stats)
    return MeasuredSAE(sae.to(device))


def _measured(site: MeasuredSAE, lm: LM, asked: Sequence[Question], answers: AnswerConfig) -> MeasuredSAE:
    if site.stats is not None:
        return site
    return MeasuredSAE(site.sae, own_stats(lm, site.sae, [row["messages"] for row in asked], answers))


def _tuned(source: str, device: str) -> LM:
    found = last_of_each(read_snapshots(source))
    if len(found) != 1:
        raise ConfigError(f"TUNED is one fine-tune, {source} holds {len(found)}: give one of them")
    return found[0].open(device)


def _planned(
    saes: Sequence[Path], base: str, tuned: str, case: Case, config: ReverseConfig
) -> tuple[str, Mapping[str, Any]]:
    facts = {
        "base": base,
        "tuned": tuned,
        "saes": [str(path) for path in saes],
        "development": len(case.development),
        "test": {one.name: len(one.questions) for one in case.variants},
        "not tested": [name for name in STANDARD[:5] if name not in {one.name for one in case.variants}]
        + [f"after {name} training" for name in ("good", "bad") if name not in case.further],
        "further training": {name: len(rows) for name, rows in case.further.items()},
        "candidates": len(saes) * (config.n_up + config.n_down),
        "modes": list(MODES),
    }
    return "\n".join(f"{name}: {_said(value)}" for name, value in facts.items()), facts


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "none"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
