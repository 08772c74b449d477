"""Reverse: undo a fine-tune's misalignment by editing a few latents at inference, and certify what that is worth.

Latents, mode and strengths are chosen on development questions (`minimal_set`); every number of the certificate is
measured on other questions, with the edit then frozen. Beside it, on the same questions: the base, the tuned model,
the same latents ablated and capped, random latents and directions that move the stream as far, the wrong sign, the
difference of means with a search of its own, and a prompt. Further training trains the tuned model on without the edit.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, DataError
from sae_persona.runs import versions
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.apply import intervene
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Placed
from sae_persona.steering.rows import EditsMeet
from sae_persona.steering.side_effects import HeldOut
from sae_persona.steering.strength import Judge
from sae_persona.studies.battery import Battery, Question, Variant, check_apart
from sae_persona.studies.bounds import Bounds
from sae_persona.studies.candidates import Drift, MeasuredSAE, Mode, drift
from sae_persona.studies.certificate import Certificate, EditedLatent, Searched
from sae_persona.studies.development import Development
from sae_persona.studies.exams import marks
from sae_persona.studies.finetune import FinetuneConfig, finetune
from sae_persona.studies.induce import InduceConfig, induce
from sae_persona.studies.minimal_set import Found, SearchConfig, edits_of, minimal_set
from sae_persona.studies.readings import Prompt, check_comparable
from sae_persona.studies.reversal_arms import BAD, GOOD, Arm
from sae_persona.studies.rivals import dense_rivals, moves, own_stats, random_directions, random_latents, wrong_sign
from sae_persona.types import HookPoint


@dataclass(frozen=True, kw_only=True)
class ReverseConfig:
    """How a reversal is searched for and tested."""

    n_up: int = 6
    """Candidates at each hook point: latents that rose most."""
    n_down: int = 2
    """Candidates at each hook point: latents that fell most."""
    n_random: int = 5
    """Sets of random latents, and of random directions."""
    further_steps: int = 30
    """Steps of further training, good and bad, of 32 rows each."""
    max_fvu: float = 0.5
    """Fraction of variance that an SAE may miss of the base at the prompts."""
    force: bool = False
    """Go on with an SAE that misses more."""
    examples: int = 6
    """Answers kept for the report."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """The search on the development questions."""
    bounds: Bounds = field(default_factory=Bounds)
    """What a reversal must keep."""
    induce: InduceConfig | None = field(default_factory=InduceConfig)
    """The dose curve in the base; None leaves it out."""
    answers: AnswerConfig = field(default_factory=lambda: AnswerConfig(batch=256))
    """How answers are sampled."""

    def __post_init__(self) -> None:
        if self.n_up + self.n_down < 1 or min(self.n_up, self.n_down, self.n_random, self.examples) < 0:
            raise ConfigError(
                "n_up + n_down is at least 1, n_random and examples at least 0, "
                f"got {self.n_up}, {self.n_down}, {self.n_random} and {self.examples}"
            )
        if self.further_steps < 1 or not self.max_fvu > 0:
            raise ConfigError(
                f"further_steps is at least 1 and max_fvu above 0, got {self.further_steps} and {self.max_fvu}"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """What a reversal is chosen and tested on.

    development   question rows as `exams.exam` takes them: messages, trait, domain
    variants      other questions, under the names of `reversal_arms.STANDARD` as far as they are those
    further       "good", "bad" -> rows to train the tuned model on; tested with the questions of the core variants
                  that are not in the domain
    """

    development: Sequence[Question]
    variants: Sequence[Variant]
    judge: Judge
    domain: str = ""
    """What the model was tuned on, as questions name it."""
    name: str = ""
    """Of the tuned model, on the certificate; by default where it was loaded from."""
    further: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    held_out: Any = None
    """Texts on which cross entropy is read, as `read_texts` takes them."""
    prompt: str | None = None
    """A system message that asks for good answers."""

    def __post_init__(self) -> None:
        if not self.development:
            raise ConfigError("there is no development question: give some")
        if not any(one.core for one in self.variants):
            raise ConfigError("no variant asks for the misalignment itself: give core questions to test on")
        if unknown := set(self.further) - {"good", "bad"}:
            raise ConfigError(f"further training is good or bad, got {min(unknown)!r}")
        check_apart(self.development, self.variants)


@dataclass(frozen=True, eq=False)
class Reversal:
    """The certificate, and the edit that it is of."""

    certificate: Certificate
    intervention: Intervention


Say = Callable[[str], None]


def reverse(
    base: LM,
    tuned: LM,
    sites: Sequence[MeasuredSAE],
    case: Case,
    config: ReverseConfig | None = None,
    *,
    say: Say = print,
) -> Reversal:
    """Find the smallest set of latents whose edit reverses the tuned model, and test it.

    sites   hook points with their SAEs, of the base; one that was measured on no corpus is measured on the base's own
            answers to the development questions
    say     hears of progress

    ModelError for another architecture, tokenizer or width, or weights that are not finite; DataError for an SAE that
    misses too much of the base, a model that is not more misaligned than its base, or one question in both parts;
    ConfigError for what is missing.
    """
    config, start = config or ReverseConfig(), time.perf_counter()
    _check(base, tuned, sites)
    chats = [row["messages"] for row in case.development]
    asked = [Prompt(str(i), tuple(chat)) for i, chat in enumerate(chats)]
    search = config.search
    moved = drift(
        base, tuned, sites, asked,
        n_up=config.n_up, n_down=config.n_down, max_fvu=config.max_fvu, force=config.force,
    )  # fmt: skip
    sites = [
        one if one.stats else MeasuredSAE(one.sae, own_stats(base, one.sae, chats, config.answers)) for one in sites
    ]
    by_hook = {one.hook: one for one in sites}
    saes = {hook: one.sae for hook, one in by_hook.items()}
    dev = Development(base, tuned, saes, case.development, case.judge, config.answers, case.domain)
    if dev.untreated.excess <= search.aim:
        raise DataError(
            f"{tuned.name} is not more misaligned than {base.name} on the development questions "
            f"({dev.untreated.excess:+.3f}): there is nothing to reverse"
        )
    say(f"{len(moved.candidates)} candidates; misaligned over the base on development: {dev.untreated.excess:+.2f}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditsMeet)  # of sets that are only tried
        found = minimal_set(dev, moved.candidates, search, on_found=lambda one: say(_line(one)))
        rivals = dense_rivals(dev, moved.direction, search)
    chosen = found[0]
    edits = chosen.edits(search.positions)
    distances = moves(tuned, saes, edits, chats, config.answers)
    held_out, ce_base = None, math.nan
    if case.held_out is not None:
        held_out, ce_base = HeldOut(tuned, case.held_out), HeldOut(base, case.held_out).ce
    variants = [*case.variants, *_trained_on(tuned, case, config, say)]
    battery = Battery(base, tuned, saes, variants, case.judge, config.answers, held_out)
    arms = []
    for arm in _arms(battery, chosen, rivals, distances, by_hook, case, config):
        arms.append(arm)
        say(f"{arm.name}: " + ", ".join(f"{cell.rate.value:.2f} {name}" for name, cell in arm.cells.items()))
    induction = None
    if config.induce is not None:
        latents = [candidate for candidate, _ in chosen.members]
        core = [row for one in case.variants if one.core for row in one.questions]
        induction = induce(
            base, by_hook, latents, core, case.judge, config.induce, domain=case.domain, answers=config.answers
        )
    certificate = Certificate(
        base=base.name,
        tuned=case.name or tuned.name,
        domain=case.domain,
        edits=_rows(chosen, distances),
        searched=(*map(_searched, found), *(_rival(name, *one) for name, one in rivals.items())),
        arms=tuple(arms),
        core=tuple(one.name for one in case.variants if one.core),
        bounds=config.bounds,
        ce_base=ce_base,
        ce_tuned=math.nan if held_out is None else held_out.ce,
        config=asdict(config),
        about=_about(base, tuned, sites, moved, start),
        examples=_examples(tuned, edits, saes, case, config),
        induction=induction,
    )
    evidence = {"certificate": {name: certificate.to_json()[name] for name in ("verdict", "reasons", "base", "tuned")}}
    return Reversal(certificate, Intervention.of(tuned, saes, edits, evidence=evidence))


def _check(base: LM, tuned: LM, sites: Sequence[MeasuredSAE]) -> None:
    check_comparable(base, tuned)
    if not sites:
        raise ConfigError("there is no SAE whose latents could be edited: give one")
    hooks = [one.hook for one in sites]
    if twice := [hook for hook in hooks if hooks.count(hook) > 1]:
        raise ConfigError(f"there are two SAEs of {twice[0]}: give one for each hook point")
    for hook in hooks:
        base.check(hook)


def _trained_on(tuned: LM, case: Case, config: ReverseConfig, say: Say) -> list[Variant]:
    """The tuned model after further training, asked what is not of the domain."""
    found = []
    asked = [row for one in case.variants if one.core for row in one.questions if row.get("domain") != case.domain]
    for name, variant in (("good", GOOD), ("bad", BAD)):
        if name in case.further:
            training = FinetuneConfig(steps=config.further_steps, keep=(), seed=1)
            *_, (_, lm) = finetune(tuned, case.further[name], training)
            say(f"trained on, on {name} rows, {config.further_steps} steps")
            found.append(Variant(name=variant, questions=asked, lm=lm))
    return found


def _arms(
    battery: Battery,
    chosen: Found,
    rivals: Mapping[str, tuple[list[Placed], Any, int]],
    distances: Sequence[float],
    sites: Mapping[HookPoint, MeasuredSAE],
    case: Case,
    config: ReverseConfig,
) -> Iterator[Arm]:
    """Every arm, one after the other."""
    search, seed = config.search, config.answers.seed
    yield battery.base
    yield battery.untreated
    yield battery.run("chosen latents", "chosen", chosen.edits(search.positions))
    rising = [member for member in chosen.members if member[0].can("ablate")]
    milder: tuple[tuple[Mode, str], ...] = (("ablate", "ablated"), ("cap", "capped"))
    for mode, kind in milder:
        if rising and chosen.mode != mode:
            low = [(candidate, search.caps[0]) for candidate, _ in rising]
            yield battery.run(f"the same {kind}", kind, edits_of(low, mode, search.positions))
    for name, (edits, _, _) in rivals.items():
        yield battery.run(f"difference of means {name}", "difference of means", edits)
    if case.prompt is not None:
        yield battery.run_prompt("a good prompt", "prompt", case.prompt)
    yield battery.run("wrong sign", "wrong sign", wrong_sign(chosen.members, search), core_only=True)
    drawn = random_latents(sites, chosen.members, distances, config.n_random, search, seed=seed)
    for i, edits in enumerate(drawn):
        yield battery.run(f"random latents {i + 1}", "random latents", edits, core_only=True)
    d_model = battery.tuned.d_model
    for i, edits in enumerate(
        random_directions(chosen.members, distances, d_model, config.n_random, search, seed=seed)
    ):
        yield battery.run(f"random directions {i + 1}", "random directions", edits, core_only=True)


def _rows(chosen: Found, distances: Sequence[float]) -> tuple[EditedLatent, ...]:
    return tuple(
        EditedLatent(
            hook=str(candidate.hook),
            latent=candidate.latent,
            mode=chosen.mode,
            strength=strength,
            unit=candidate.unit,
            value=getattr(candidate.edit(chosen.mode, strength).edit, "value", 0.0),
            rise=candidate.rise,
            base_act=candidate.base_act,
            tuned_act=candidate.tuned_act,
            distance=distance,
            without=without,
        )
        for (candidate, strength), distance, without in zip(chosen.members, distances, chosen.without, strict=True)
    )


def _line(found: Found) -> str:
    members = ", ".join(f"{c.name}{'' if found.mode == 'ablate' else f' x {s:g}'}" for c, s in found.members)
    return f"{found.mode}: {members}: excess {found.tried.excess:+.3f}, loss {found.tried.loss:+.3f}"


def _searched(found: Found) -> Searched:
    edits = ", ".join(f"{c.name}{'' if found.mode == 'ablate' else f' x {s:g}'}" for c, s in found.members)
    tried = found.tried
    return Searched(found.mode, len(found.members), tried.excess, tried.loss, found.reached, found.n_tries, edits)


def _rival(name: str, edits: Sequence[Placed], tried: Any, n: int) -> Searched:
    strength = getattr(edits[0].edit, "strength", None)
    at = ", ".join(str(one.hook) for one in edits) + ("" if strength is None else f" x {strength:g}")
    return Searched(f"difference of means {name}", 0, tried.excess, tried.loss, False, n, at)


def _about(base: LM, tuned: LM, sites: Sequence[MeasuredSAE], moved: Drift, start: float) -> dict[str, Any]:
    return {
        "config_hash": base.config_hash,
        "saes": {str(one.hook): one.sae.fingerprint for one in sites},
        "fvu": {str(hook): list(missed) for hook, missed in moved.fvu.items()},
        "candidates": [asdict(one) | {"hook": str(one.hook)} for one in moved.candidates],
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 1),
        "tuned": tuned.name,
    }


def _examples(
    tuned: LM, edits: Sequence[Placed], saes: Mapping[HookPoint, Any], case: Case, config: ReverseConfig
) -> tuple[tuple[str, str, str], ...]:
    """Answers before and after, of the first questions of each core variant in turn."""
    core = [list(one.questions) for one in case.variants if one.core]
    turns = [row for rows in zip(*core, strict=False) for row in rows][: config.examples]
    if not turns:
        return ()
    answers = replace(config.answers, temperature=0.0)
    before = marks(tuned, turns, case.judge, config=answers)
    with intervene(tuned, saes, edits):
        after = marks(tuned, turns, case.judge, config=answers)
    return tuple(zip(before.question.tolist(), before.answers, after.answers, strict=True))
