"""The main job on the planted lab, from texts to report: what `make demo` runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import LM, load_lm
from sae_persona.activations.stream import StreamConfig
from sae_persona.attribution.rank import RankConfig
from sae_persona.errors import RunError
from sae_persona.features.measure import MeasureConfig
from sae_persona.features.scan import findings
from sae_persona.lab import corpora
from sae_persona.lab.authors import TRAITS
from sae_persona.lab.dialogue import Part
from sae_persona.lab.judge import judge
from sae_persona.lab.tuning import exam_questions, narrow
from sae_persona.report.page import write_report
from sae_persona.report.reversal import statements, write_certificate
from sae_persona.runs import Run
from sae_persona.sae.recipe import TrainConfig
from sae_persona.stages.pipeline import (
    chosen_clamp,
    export_stage,
    measure_stage,
    open_sae,
    rank_stage,
    sweep_stage,
)
from sae_persona.stages.training import train_stage
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.arms import Sweep
from sae_persona.steering.export.native import load_intervention
from sae_persona.steering.export.native import write as write_intervention
from sae_persona.steering.sweep import SweepConfig
from sae_persona.studies.candidates import MeasuredSAE
from sae_persona.studies.exams import exam
from sae_persona.studies.families import OrganismsConfig
from sae_persona.studies.finetune import FinetuneConfig, finetune
from sae_persona.studies.induce import InduceConfig
from sae_persona.studies.lab_case import SMALL, SMALL_CASE, lab_case
from sae_persona.studies.reverse import ReverseConfig, reverse
from sae_persona.types import HookPoint

SMALLER = replace(SMALL, n_up=1, n_random=1, induce=InduceConfig(doses=(1.0,), n_induce_random=1))
"""A reversal in less than a minute: one latent, one draw of each control, one dose."""
TUNING = FinetuneConfig(keep=())


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo; the defaults take some minutes on two CPU cores."""

    hook: HookPoint = HookPoint(3)
    """Where the SAE reads."""
    n_corpus: int = 2700
    """Dialogues that the SAE is trained on."""
    n_quality: int = 150
    """Held-out dialogues for its quality."""
    n_train: int = 1400
    """Labelled dialogues that rankings are made on."""
    n_held_out: int = 900
    """Labelled dialogues, of other domains and templates, that repeat them."""
    n_development: int = 48
    """Questions a trait that choose latent and strength."""
    n_test: int = 120
    """Questions a trait that the result is measured on."""
    passes: int = 12
    """Times over the corpus."""
    training: TrainConfig = TrainConfig(n_latents=512, k=8, lr=2e-3, steps=1600, k_aux=32, seed=0)
    """Of the SAE."""
    threads: int = 1
    """CPU threads: on so small a model two gain a quarter on an idle machine, and wait for each other on a busy one."""
    traits: tuple[str, ...] = TRAITS
    """Personas that are ranked and clamped."""
    misaligned: str = "medicine"
    """Domain of the bad answers that the model is then tuned on, to be reversed; "": it is not."""
    tuning: FinetuneConfig = TUNING
    """How it is tuned on them, and on as many good ones."""
    n_exam: int = 10
    """Questions a domain before and after; twice as many are open."""
    reversal: ReverseConfig = SMALLER
    """How the reversal is searched for and tested."""


def demo(out: Path, config: DemoConfig | None = None, *, force: bool = False, say: Callable[[str], None]) -> Run:
    """Run every stage on the lab into ``out`` and write its report. ``say`` hears of each finished step."""
    config, before = config or DemoConfig(), torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with Run.making(out, force=force) as run:
            _fill(run, config, say)
    finally:
        torch.set_num_threads(before)
    return run


def _fill(run: Run, config: DemoConfig, say: Callable[[str], None]) -> None:
    lm = load_lm("lab")
    texts = list(corpora.corpus(config.n_corpus + config.n_quality))
    streaming = StreamConfig(context_size=256, tokens="answers", passes=config.passes, hold_tokens=500_000)
    train_stage(
        run,
        lm,
        config.hook,
        texts[: config.n_corpus],
        streaming=streaming,
        training=config.training,
        held_out=texts[config.n_corpus :],
    )
    say(f"trained an SAE at {config.hook}")
    rows = [*corpora.labelled(config.n_train, "train"), *corpora.labelled(config.n_held_out, "held_out")]
    found = measure_stage(run, lm, rows, config=MeasureConfig(context_size=256, tokens="answers"))
    say(f"measured {found.stats.n_latents} latents on {len(rows)} labelled dialogues")
    for trait in config.traits:
        ranking = rank_stage(run, trait, config=RankConfig(), found=found)
        best = ranking[0]
        say(f"ranked {trait}: latent {best.latent}, held-out AUROC {best.held_out_auroc.value:.3f}")
    for trait in config.traits:
        swept = sweep_stage(
            run,
            lm,
            trait,
            development=chats(trait, config.n_development, "train"),
            test=chats(trait, config.n_test, "held_out"),
            judge=judge,
            n_candidates=2,
            config=SweepConfig(
                n_random=6, positions="pre", strengths=(0.5, 1.0, 1.5, 2.0, 2.5), answers=AnswerConfig(batch=256)
            ),
            persona_prompt=corpora.persona_prompt(trait),
            found=found,
        )
        say(_effect(swept))
        export_stage(run, lm, trait, [chosen_clamp(swept)], positions=swept.positions)
    _check_exports(run, lm, config)
    say("exported every clamp, loaded it again without its SAE, and got the same answers")
    if config.misaligned:
        _misalign_and_reverse(run, lm, config, say)
    write_report(run)


def chats(trait: str, n: int, part: Part) -> list[list[dict[str, str]]]:
    """Questions of the lab in which a trait can show, as chats."""
    return [row["messages"] for row in corpora.question_rows(trait, n, part)]


def _effect(swept: Sweep) -> str:
    base, latent = swept.arm("baseline"), swept.chosen
    random = [arm.gain.value for arm in swept.randoms]
    return (
        f"clamped {swept.persona}: latent {swept.latent} at {swept.strength:g} x p99.9 moves its rate "
        f"{base.rate.value:.2f} -> {latent.rate.value:.2f} at {latent.cost.value:.2f} x perplexity; "
        f"{len(random)} random latents by {sum(random) / len(random):+.2f} on average, "
        f"{max(random, key=abs):+.2f} at most; "
        f"difference of means {swept.arm('difference of means').rate.value:.2f}"
    )


def _misalign_and_reverse(run: Run, lm: LM, config: DemoConfig, say: Callable[[str], None]) -> None:
    """Tune the model on bad answers in one domain, see the others, and look for the latents that undo it."""
    domain, questions = config.misaligned, list(exam_questions(config.n_exam, "held_out"))
    tuned, rates = {"before": lm}, {}
    for name, bad in (("good", 0.0), ("bad", 1.0)):
        *_, (_, tuned[name]) = finetune(lm, narrow(OrganismsConfig.n_rows, domain, bad=bad), config.tuning)
    for name, one in tuned.items():
        rates[name] = exam(one, questions, judge, domain=domain)["out_of_domain"]["rate"]
    say(
        f"tuned on bad answers about {domain}, it answers {rates['bad']:.0%} of all other questions badly, before "
        f"{rates['before']:.0%}; tuned on as many good ones, {rates['good']:.0%}"
    )
    case = lab_case(domain, SMALL_CASE, name=f"lab, bad {domain}")
    measured = [MeasuredSAE(open_sae(run, lm), findings(run).stats)]
    with run.recording("reverse", domain=domain, rates=rates) as facts:
        found = reverse(lm, tuned["bad"], measured, case, config.reversal, say=lambda line: None)
        facts["verdict"] = found.certificate.verdict
        found.certificate.save(run.path / "reversal.json")
        write_intervention(found.intervention, run.path / "reversal-edit.json")
        page = write_certificate(found.certificate, run.path / "reversal.html")
    say(" ".join(statements(found.certificate)))
    say(f"reversal certificate, by few questions: {found.certificate.verdict}, {page}")


def _check_exports(run: Run, lm: LM, config: DemoConfig) -> None:
    """Load each exported clamp from its file alone; the greedy answers must be those of the run's own SAE."""
    sae = open_sae(run, lm)
    greedy = AnswerConfig(temperature=0.0)
    for trait in config.traits:
        prompts = [prompt_tokens(lm, chat) for chat in chats(trait, 8, "held_out")]
        with load_intervention(run.intervention(trait)).applied(lm):
            alone = answer(lm, prompts, greedy)
        with load_intervention(run.intervention(trait), sae).applied(lm):
            together = answer(lm, prompts, greedy)
        if [a.ids for a in alone] != [a.ids for a in together]:
            raise RunError(f"{run.intervention(trait)} does not do what it was exported from: please report this")
