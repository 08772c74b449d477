"""Strength against effect: a latent, and everything that it has to beat.

The latent and its strength are chosen on development questions; every number that is reported as a result is measured
on test questions, with the strengths then fixed. Beside the latent stand, on the same questions: the same strength with
the wrong sign; random latents of like firing rate, set to the same activation; the difference of means at the latent's
perplexity cost; the persona as a prompt. Or all of them at the same divergence from the unsteered model.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.attribution.association import Interval
from sae_persona.errors import ConfigError, DataError
from sae_persona.sae.model import SAE
from sae_persona.steering.answers import Answer, AnswerConfig
from sae_persona.steering.arms import Arm, Sweep
from sae_persona.steering.bench import Bench, Messages, Questions, check_apart
from sae_persona.steering.dial import DialConfig, MakeEdits, OutOfReach, solve_strength
from sae_persona.steering.divergence import Readings, Track
from sae_persona.steering.interventions import Clamp, Edit, Steer
from sae_persona.steering.positions import Positions, check_positions
from sae_persona.steering.side_effects import HeldOut
from sae_persona.steering.strength import QUALITIES, Judge, Outcome, cost, gain, perplexity, wilson

MORE_STRENGTHS = 6  # of the difference of means, each half as strong again as the last
UNKNOWN = Interval(math.nan, math.nan, math.nan)


class LeftOut(UserWarning):
    """A candidate cannot be dialled to the budget."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How strengths are tried."""

    strengths: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0)
    """Clamps tried on the latent, in multiples of its 99.9th percentile."""
    dense_strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0)
    """Multiples of the difference of means that are added."""
    positions: Positions = "answer"
    """Tokens that are edited."""
    pick: Literal["rate", "dose", "kl"] = "rate"
    """Which clamp is chosen of those inside the bounds. rate: the cheapest of about the highest rate. dose: each
    latent's strongest, and of these the highest rate. kl: each latent dialled to --budget, and of these the highest
    rate; difference of means and random latents are dialled to it, too."""
    max_cost: float = 1.5
    """Highest perplexity, as a multiple of the unsteered answers', that a chosen strength may cost."""
    min_valid: float = 0.75
    """Lowest share of valid answers at a chosen strength. No bound where the judge does not know which are."""
    slack: float = 0.02
    """Of the affordable clamps whose rate is within this of the highest, the cheapest is chosen."""
    n_random: int = 8
    """Random latents on the test questions."""
    examples: int = 4
    """Answers kept for the report, an arm."""
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    """How answers are sampled."""
    dial: DialConfig = field(default_factory=DialConfig)
    """The divergence that is read of every arm, and the budget."""

    def __post_init__(self) -> None:
        check_positions(self.positions)
        if not self.strengths or not self.dense_strengths:
            raise ConfigError("strengths and dense_strengths need at least one value each")
        if not all(0 < s < math.inf for s in (*self.strengths, *self.dense_strengths)):
            raise ConfigError(f"strengths are finite and above 0, got {self.strengths} and {self.dense_strengths}")
        if self.pick not in ("rate", "dose", "kl"):
            raise ConfigError(f"pick is rate, dose or kl, got {self.pick!r}")
        for name in ("slack", "min_valid"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} lies between 0 and 1, got {getattr(self, name)}")
        if not self.max_cost > 1:
            raise ConfigError(f"max_cost is a multiple above 1, got {self.max_cost}")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A latent that may be clamped."""

    latent: int
    unit: float
    """Its 99.9th percentile."""

    def clamp(self, strength: float) -> list[Edit]:
        return [Clamp(self.latent, strength, self.unit)]


@dataclass(eq=False)
class _Part:
    """Runs arms on one part's questions, and keeps its baseline."""

    bench: Bench
    persona: str
    config: SweepConfig
    held_out: HeldOut | None = None
    baseline: Outcome | None = None

    @cached_property
    def track(self) -> Track:
        return Track(self.bench.lm, self.bench.questions.prompts, self.config.dial.reading)

    def dial(self, make: MakeEdits) -> float:
        """The strength that meets the budget, rounded as it is shown."""
        dial = solve_strength(
            self.bench.lm, self.bench.saes, make, [], self.config.dial,
            hook=self.bench.hook, positions=self.bench.positions, track=self.track,
        )  # fmt: skip
        return float(f"{dial.strength:.4g}")

    def run(
        self, kind: str, edits: Sequence[Edit] = (), *, strength: float | None = None, latent: int | None = None
    ) -> Arm:
        """Answer every question under the edits and score the answers against the baseline's."""
        outcome, written = self.bench.ask(edits)
        if self.baseline is None:
            self.baseline = outcome
        readings = ce = None
        if edits:
            readings = self.track.read(self.bench.saes, edits, hook=self.bench.hook, positions=self.bench.positions)
        if edits and self.held_out:
            ce = self.held_out.cost(self.bench.saes, edits, hook=self.bench.hook)
        return self._arm(kind, strength, latent, outcome, written, readings, ce)

    def run_prompt(self) -> Arm:
        """Answer every question after the message that asks for the persona."""
        prompts = self.bench.questions.persona_prompts
        assert prompts is not None, "the caller has looked"
        outcome, written = self.bench.ask((), prompts=prompts)
        return self._arm("prompt", None, None, outcome, written, self.track.read_prompts(prompts), None)

    def _arm(
        self,
        kind: str,
        strength: float | None,
        latent: int | None,
        outcome: Outcome,
        written: list[Answer],
        readings: Readings | None,
        ce: Interval | None,
    ) -> Arm:
        base, questions = self.baseline or outcome, self.bench.questions
        nothing = np.full(len(written), np.nan)
        asked = np.array(questions.texts)
        score, before = outcome.scores.get(self.persona, nothing), base.scores.get(self.persona, nothing)
        others = sorted(set(outcome.scores) & set(base.scores) - {self.persona, *QUALITIES})
        marks = outcome.steering_score(self.persona)
        shown = zip(questions.texts[: self.config.examples], written[: self.config.examples], strict=True)
        return Arm(
            kind=kind,
            part=questions.part,
            strength=strength,
            latent=latent,
            rate=wilson(score, asked),
            gain=gain(score, before, asked),
            cost=cost(outcome.surprise, base.surprise, asked),
            perplexity=perplexity(outcome.surprise),
            valid=wilson(outcome.scores.get("valid", nothing), asked),
            side_effects={t: gain(outcome.scores[t], base.scores[t]).value for t in others},
            n=len(written),
            n_questions=len(set(questions.texts)),
            examples=tuple((question, a.text) for question, a in shown),
            readings=readings,
            score=None if marks is None else gain(marks, np.zeros(len(marks)), asked),
            ce=ce,
            unread=outcome.unread,
        )


def sweep(
    lm: LM,
    sae: SAE,
    persona: str,
    *,
    candidates: Sequence[Candidate],
    matched: Callable[[int], Sequence[int]],
    direction: Tensor,
    development: Sequence[Messages],
    test: Sequence[Messages],
    judge: Judge,
    persona_prompt: str | None = None,
    held_out: HeldOut | None = None,
    config: SweepConfig | None = None,
    on_arm: Callable[[Arm], None] | None = None,
) -> Sweep:
    """Choose a latent and a strength on development questions, then measure it and its controls on test questions.

    candidates       latents to choose from, best first
    matched          gives random latents of like firing rate to the one chosen; the first ``n_random`` are used
    direction        [d_in] difference of means at the same token, the persona minus the others
    development, test   chats that end with a user's question; no question may be in both
    persona_prompt   a system message that asks for the persona; None leaves that arm out
    held_out         texts on which the test arms' cross entropy is read

    DataError if there are no questions, one is in both parts, or no candidate can be dialled to the budget;
    ConfigError if there is no candidate. `LeftOut` warns of candidates that cannot.
    """
    config = config or SweepConfig()
    if not candidates:
        raise ConfigError(f"no latent to clamp for {persona}: none rises with it")
    parts = [
        Questions.of(lm, "development", development, persona_prompt),
        Questions.of(lm, "test", test, persona_prompt),
    ]
    check_apart(parts[0].texts, parts[1].texts)
    benches = [Bench(lm, sae, judge, part, config.answers, sae.hook, config.positions) for part in parts]
    dev, held = _Part(benches[0], persona, config), _Part(benches[1], persona, config, held_out)
    arms: list[Arm] = []

    def keep(arm: Arm) -> Arm:
        arms.append(arm)
        if on_arm:
            on_arm(arm)
        return arm

    if math.isnan(keep(dev.run("baseline")).rate.value):
        raise DataError(f"the judge never scores {persona} on these questions: choose a judge that knows it")
    tried = [keep(arm) for arm in _candidate_arms(dev, candidates)]
    best = choose(tried, config)
    chosen = next(candidate for candidate in candidates if candidate.latent == best.latent)
    strength = best.strength or 0.0
    equal = _dense_strength(dev, direction, best, keep)

    keep(held.run("baseline"))
    for arm in _latent_arms(held, chosen, sorted({*config.strengths, strength})):
        keep(arm)
    keep(held.run("wrong sign", chosen.clamp(-strength), strength=-strength, latent=chosen.latent))
    for latent in matched(chosen.latent)[: config.n_random]:
        same = _random_strength(dev, Candidate(latent=latent, unit=chosen.unit), strength)
        keep(held.run("random", [Clamp(latent, same, chosen.unit)], strength=same, latent=latent))
    keep(held.run("difference of means", [Steer(direction, equal)], strength=equal))
    if held.bench.questions.persona_prompts:
        keep(held.run_prompt())
    return Sweep(
        persona=persona,
        latent=chosen.latent,
        unit=chosen.unit,
        strength=strength,
        positions=config.positions,
        config=asdict(config),
        arms=tuple(arms),
    )


def _latent_arms(part: _Part, candidate: Candidate, strengths: Iterable[float]) -> Iterator[Arm]:
    for strength in strengths:
        yield part.run("latent", candidate.clamp(strength), strength=strength, latent=candidate.latent)


def _candidate_arms(dev: _Part, candidates: Sequence[Candidate]) -> Iterator[Arm]:
    """Every candidate at every strength, or each at the one that meets the budget."""
    problem: OutOfReach | None = None
    n = 0
    for candidate in candidates:
        strengths: Sequence[float] = dev.config.strengths
        if dev.config.pick == "kl":
            try:
                strengths = [dev.dial(candidate.clamp)]
            except OutOfReach as error:
                problem = error
                warnings.warn(f"latent {candidate.latent} is left out: {error}", LeftOut, stacklevel=2)
                continue
        n += 1
        yield from _latent_arms(dev, candidate, strengths)
    if problem and not n:
        raise problem


def _dense_strength(dev: _Part, direction: Tensor, latent: Arm, keep: Callable[[Arm], Arm]) -> float:
    """The strength of the difference of means that is the latent's equal, in cost or in divergence."""
    if dev.config.pick == "kl":
        strength = dev.dial(lambda s: [Steer(direction, s)])
        keep(dev.run("difference of means", [Steer(direction, strength)], strength=strength))
        return strength
    return _equal_cost([keep(arm) for arm in _dense_arms(dev, direction, latent)], latent)


def _random_strength(dev: _Part, control: Candidate, strength: float) -> float:
    """The latent's own strength, or what gives the control the latent's divergence, as near as it comes."""
    if dev.config.pick != "kl":
        return strength
    try:
        return dev.dial(control.clamp)
    except OutOfReach as error:
        return error.strength


def _dense_arms(dev: _Part, direction: Tensor, latent: Arm) -> Iterator[Arm]:
    """The strengths asked for, then stronger ones until one costs what the latent does."""
    strengths = sorted(dev.config.dense_strengths)
    strengths += [strengths[-1] * 1.5 ** (i + 1) for i in range(MORE_STRENGTHS)]
    dearest = 0.0
    for i, strength in enumerate(strengths):
        if i >= len(dev.config.dense_strengths) and dearest >= latent.cost.value:
            return
        arm = dev.run("difference of means", [Steer(direction, strength)], strength=strength)
        dearest = max(dearest, arm.cost.value)
        yield arm


def is_coherent(arm: Arm, config: SweepConfig) -> bool:
    """Whether an arm is inside the bounds on perplexity and on valid answers."""
    return arm.cost.value <= config.max_cost and not arm.valid.value < config.min_valid


def choose(arms: Sequence[Arm], config: SweepConfig) -> Arm:
    """The arm that ``config.pick`` means among those that are coherent; if none is, the cheapest of all."""
    coherent = [arm for arm in arms if is_coherent(arm, config)] or [min(arms, key=lambda a: a.cost.value)]
    if config.pick == "rate":
        highest = max(arm.rate.value for arm in coherent)
        good = [arm for arm in coherent if arm.rate.value >= highest - config.slack]
        return min(good, key=lambda arm: arm.cost.value)
    strongest = {arm.latent: arm for arm in sorted(coherent, key=lambda arm: arm.strength or 0.0)}
    return max(strongest.values(), key=lambda arm: arm.rate.value)


def _equal_cost(dense: Sequence[Arm], latent: Arm) -> float:
    """The strength of the difference of means that costs what the latent does: log-linear between those tried."""
    strengths = [0.0, *(arm.strength or 0.0 for arm in dense)]
    costs = np.maximum.accumulate([0.0, *(math.log(arm.cost.value) for arm in dense)])
    return round(float(np.interp(math.log(max(latent.cost.value, 1.0)), costs, strengths)), 4)
