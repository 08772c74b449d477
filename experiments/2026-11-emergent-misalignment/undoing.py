"""What undoes misalignment, each with the SAEs of one seed, a function a job.

reversal-NAME.json, .html    the certificate of an organism, and its page; edit-NAME.json, the edit that it is of
prevent.json                 the rows of the first domain, tuned on with guards
realign.json                 the fine-tune on them, healed, and let relearn
coupling.json, .html         the lab's traits, each moved, all measured
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from settings import Settings

from sae_persona.activations.lm import LM, load_lm
from sae_persona.attribution.rank import RankConfig
from sae_persona.features.scan import findings
from sae_persona.lab import corpora
from sae_persona.lab.authors import TRAITS
from sae_persona.lab.judge import judge
from sae_persona.lab.tuning import exam_questions, narrow, shown
from sae_persona.lab.world import DOMAINS
from sae_persona.report.coupling import write_coupling
from sae_persona.report.reversal import write_certificate
from sae_persona.runs import Run
from sae_persona.stages.coupling import CoupleConfig, Couples, couple_stage
from sae_persona.stages.pipeline import open_sae, rank_stage
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.dial import DialConfig
from sae_persona.steering.export.native import write as write_intervention
from sae_persona.studies.candidates import MeasuredSAE
from sae_persona.studies.finetune import FinetuneConfig
from sae_persona.studies.lab_case import SMALL, SMALL_CASE, organism_case
from sae_persona.studies.organisms import Organism
from sae_persona.studies.panel import Panel
from sae_persona.studies.prevent import Asked, PreventConfig, prevent
from sae_persona.studies.realign import Exam, RealignConfig, realign
from sae_persona.studies.reverse import ReverseConfig, reverse

OTHER_ROWS = 500  # added to a seed: rows that no organism has been tuned on


def certify(out: Path, organism: Path, runs: Iterable[Path], model: str, settings: Settings) -> None:
    """The certificate of an organism's last checkpoint, with its page and its edit."""
    base, one, small = load_lm(model), Organism.load(organism), settings.undo.small
    sites = [MeasuredSAE(open_sae(Run.open(path), base), findings(Run.open(path)).stats) for path in runs]
    case, config = organism_case(one, SMALL_CASE if small else None), SMALL if small else ReverseConfig()
    found = reverse(base, _last(one), sites, case, config, say=lambda line: print(f"{one.name}: {line}", flush=True))
    write_certificate(found.certificate, out / f"reversal-{one.name}.html")
    write_intervention(found.intervention, out / f"edit-{one.name}.json")
    found.certificate.save(out / f"reversal-{one.name}.json")


def guard(out: Path, organism: Path, run: Path, model: str, settings: Settings) -> None:
    """Guards of a fine-tune on the rows of an organism."""
    base, one = load_lm(model), Organism.load(organism)
    asked = Asked(
        development=_exam(settings, "train"),
        test=_exam(settings, "held_out"),
        held_out=list(corpora.labelled(100, "held_out")),
        judge=judge,
        domain=one.domain,
    )
    config = PreventConfig(n_random=1) if settings.undo.small else PreventConfig()
    tuning = FinetuneConfig(steps=settings.organisms.steps, keep=(), seed=one.seed)
    found = prevent(
        base, one.rows(), Panel.load(out / "panel.json"), open_sae(Run.open(run), base), asked, tuning, config
    )
    found.save(out / "prevent.json")


def heal(out: Path, organism: Path, model: str, settings: Settings) -> None:
    """An organism healed on good rows of its own domain, and of another; and what it takes to make it bad again."""
    base, one = load_lm(model), Organism.load(organism)
    other = next(domain for domain in DOMAINS if domain != one.domain)
    config, seed = RealignConfig(), one.seed + OTHER_ROWS
    good = {
        "the same domain": narrow(max(config.n_good), one.domain, bad=0.0, seed=seed),
        "another": narrow(max(config.n_good), other, bad=0.0, seed=seed),
    }
    bad = narrow(max(config.n_bad), one.domain, seed=seed + 1)
    exam = Exam(questions=_exam(settings, "held_out"), judge=judge, domain=one.domain)
    tuned, panel = _last(one), Panel.load(out / "panel.json")
    realign(base, tuned, panel, good, bad, exam, config, FinetuneConfig(keep=(), seed=one.seed)).save(
        out / "realign.json"
    )


def couple(out: Path, run: Path, model: str, settings: Settings) -> None:
    """The traits of the lab."""
    lm, opened, n = load_lm(model), Run.open(run), 3 if settings.undo.small else 10
    for trait in TRAITS:
        rank_stage(opened, trait, config=RankConfig())

    def chats(part: Any) -> list[Any]:
        return [row["messages"] for trait in TRAITS for row in corpora.question_rows(trait, n, part)]

    asked = Couples(
        development=chats("train")[: 2 * n],
        test=chats("held_out"),
        judge=judge,
        answers=AnswerConfig(batch=256),
        dial=DialConfig(),
        rows={trait: shown(400, trait) for trait in TRAITS},
        tuning=FinetuneConfig(keep=()),
    )
    found = couple_stage(opened, lm, TRAITS, asked, CoupleConfig(), positions="answer")
    write_coupling(found, out / "coupling.html")
    found.save(out / "coupling.json")


def _last(organism: Organism) -> LM:
    return load_lm(str(organism.last.path))


def _exam(settings: Settings, part: Any) -> list[dict[str, Any]]:
    return list(exam_questions(settings.organisms.n_exam, part))
