"""Strength against effect: a latent, and everything that it has to beat.

The latent and its strength are chosen on development questions; every number that is reported as a result is measured
on test questions, with the strengths then fixed. Beside the latent stand, on the same questions: random latents of
like firing rate, set to the same activation; the difference of means at the latent's perplexity cost; the persona as
a prompt.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, DataError
from sae_persona.sae.model import SAE
from sae_persona.steering.answers import Answer, AnswerConfig, answer, surprise
from sae_persona.steering.apply import intervene
from sae_persona.steering.arms import Arm, Sweep
from sae_persona.steering.interventions import Clamp, Steer
from sae_persona.steering.positions import Positions, check_positions
from sae_persona.steering.strength import Judge, Outcome, cost, gain, perplexity, wilson

Messages = Sequence[dict[str, Any]]
MORE_STRENGTHS = 6  # of the difference of means, each half as strong again as the last


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How strengths are tried."""

    strengths: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0)
    """Clamps tried on the latent, in multiples of its 99.9th percentile."""
    dense_strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0)
    """Multiples of the difference of means that are added."""
    positions: Positions = "answer"
    """Tokens that are edited."""
    max_cost: float = 1.5
    """Highest perplexity, as a multiple of the unsteered answers', that a chosen strength may cost."""
    slack: float = 0.02
    """Of the affordable clamps whose rate is within this of the highest, the cheapest is chosen."""
    n_random: int = 8
    """Random latents on the test questions."""
    examples: int = 4
    """Answers kept for the report, an arm."""
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    """How answers are sampled."""

    def __post_init__(self) -> None:
        check_positions(self.positions)
        if not self.strengths or not self.dense_strengths:
            raise ConfigError("strengths and dense_strengths need at least one value each")
        if not all(0 < s < math.inf for s in (*self.strengths, *self.dense_strengths)):
            raise ConfigError(f"strengths are finite and above 0, got {self.strengths} and {self.dense_strengths}")
        if not 0 <= self.slack <= 1:
            raise ConfigError(f"slack lies between 0 and 1, got {self.slack}")
        if self.max_cost <= 1:
            raise ConfigError(f"max_cost is a multiple above 1, got {self.max_cost}")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A latent that may be clamped."""

    latent: int
    unit: float
    """Its 99.9th percentile."""


@dataclass(frozen=True, eq=False)
class _Questions:
    """One part's questions: their texts, their prompts, and the baseline on them."""

    part: str
    texts: list[str]
    prompts: list[list[int]]
    persona_prompts: list[list[int]] | None


@dataclass(eq=False)
class _Bench:
    """Runs arms on one part's questions, and keeps its baseline."""

    lm: LM
    judge: Judge
    persona: str
    config: SweepConfig
    questions: _Questions
    baseline: Outcome | None = None

    def run(
        self,
        kind: str,
        steering: AbstractContextManager[Any],
        *,
        strength: float | None = None,
        latent: int | None = None,
        prompts: list[list[int]] | None = None,
    ) -> Arm:
        """Answer every question under ``steering`` and score the answers against the baseline's."""
        plain = self.questions.prompts
        with steering:
            written = answer(self.lm, prompts or plain, self.config.answers)
        outcome = Outcome.of(
            self.judge,
            self.questions.texts,
            [a.text for a in written],
            surprise(self.lm, plain, written, batch=self.config.answers.batch),
        )
        if self.baseline is None:
            self.baseline = outcome
        return self._arm(kind, strength, latent, outcome, written)

    def _arm(
        self, kind: str, strength: float | None, latent: int | None, outcome: Outcome, written: list[Answer]
    ) -> Arm:
        base = self.baseline or outcome
        nothing = np.full(len(written), np.nan)
        asked = np.array(self.questions.texts)
        score, before = outcome.scores.get(self.persona, nothing), base.scores.get(self.persona, nothing)
        others = sorted(set(outcome.scores) & set(base.scores) - {self.persona, "valid"})
        return Arm(
            kind=kind,
            part=self.questions.part,
            strength=strength,
            latent=latent,
            rate=wilson(score, asked),
            gain=gain(score, before, asked),
            cost=cost(outcome.surprise, base.surprise, asked),
            perplexity=perplexity(outcome.surprise),
            valid=wilson(outcome.scores.get("valid", nothing), asked),
            side_effects={t: gain(outcome.scores[t], base.scores[t]).value for t in others},
            n=len(written),
            n_questions=len(set(self.questions.texts)),
            examples=tuple(
                (q, a.text)
                for q, a in zip(
                    self.questions.texts[: self.config.examples], written[: self.config.examples], strict=True
                )
            ),
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
    config: SweepConfig | None = None,
    on_arm: Callable[[Arm], None] | None = None,
) -> Sweep:
    """Choose a latent and a strength on development questions, then measure it and its controls on test questions.

    candidates       latents to choose from, best first
    matched          gives random latents of like firing rate to the one chosen; the first ``n_random`` are used
    direction        [d_in] difference of means at the same token, the persona minus the others
    development, test   chats that end with a user's question; no question may be in both
    persona_prompt   a system message that asks for the persona; None leaves that arm out

    DataError if there are no questions or one is in both parts, ConfigError if there is no candidate.
    """
    config = config or SweepConfig()
    if not candidates:
        raise ConfigError(f"no latent to clamp for {persona}: none rises with it")
    parts = [
        _questions(lm, "development", development, persona_prompt),
        _questions(lm, "test", test, persona_prompt),
    ]
    if shared := {str(m) for m in development} & {str(m) for m in test}:
        raise DataError(f"{len(shared)} questions are in the development and the test set, the first {min(shared)}")
    dev, held = (_Bench(lm, judge, persona, config, part) for part in parts)
    arms: list[Arm] = []

    def keep(arm: Arm) -> Arm:
        arms.append(arm)
        if on_arm:
            on_arm(arm)
        return arm

    if math.isnan(keep(dev.run("baseline", nullcontext())).rate.value):
        raise DataError(f"the judge never scores {persona} on these questions: choose a judge that knows it")
    for candidate in candidates:
        for arm in _latent_arms(dev, sae, candidate):
            keep(arm)
    best = _best([arm for arm in arms if arm.kind == "latent"], config)
    chosen = next(candidate for candidate in candidates if candidate.latent == best.latent)
    equal = _equal_cost([keep(arm) for arm in _dense_arms(dev, sae, direction, best)], best)

    keep(held.run("baseline", nullcontext()))
    for arm in _latent_arms(held, sae, chosen):
        keep(arm)
    value = (best.strength or 0.0) * chosen.unit
    for latent in matched(chosen.latent)[: config.n_random]:
        clamp = Clamp(latent, 1.0, value)
        steering = intervene(lm, sae, [clamp], positions=config.positions)
        keep(held.run("random", steering, strength=best.strength, latent=latent))
    steering = intervene(lm, None, [Steer(direction, equal)], hook=sae.hook, positions=config.positions)
    keep(held.run("difference of means", steering, strength=equal))
    if held.questions.persona_prompts:
        keep(held.run("prompt", nullcontext(), prompts=held.questions.persona_prompts))
    return Sweep(
        persona=persona,
        latent=chosen.latent,
        unit=chosen.unit,
        strength=best.strength or 0.0,
        positions=config.positions,
        config=asdict(config),
        arms=tuple(arms),
    )


def _questions(lm: LM, part: str, chats: Sequence[Messages], persona_prompt: str | None) -> _Questions:
    if not chats:
        raise DataError(f"the {part} set has no questions")
    for chat in chats:
        if not chat or chat[-1]["role"] != "user":
            raise DataError(f"a question is a chat that ends with a user's message, got {str(chat)[:60]!r}")
    asked = None
    if persona_prompt is not None:
        asked = [prompt_tokens(lm, [{"role": "system", "content": persona_prompt}, *chat]) for chat in chats]
    plain = [prompt_tokens(lm, chat) for chat in chats]
    if asked == plain:
        raise DataError(f"the chat template of {lm.name} drops system messages: leave the persona prompt out")
    return _Questions(part, [chat[-1]["content"] for chat in chats], plain, asked)


def _latent_arms(bench: _Bench, sae: SAE, candidate: Candidate) -> Iterator[Arm]:
    for strength in bench.config.strengths:
        clamp = Clamp(candidate.latent, strength, candidate.unit)
        steering = intervene(bench.lm, sae, [clamp], positions=bench.config.positions)
        yield bench.run("latent", steering, strength=strength, latent=candidate.latent)


def _dense_arms(bench: _Bench, sae: SAE, direction: Tensor, latent: Arm) -> Iterator[Arm]:
    """The strengths asked for, then stronger ones until one costs what the latent does."""
    strengths = sorted(bench.config.dense_strengths)
    strengths += [strengths[-1] * 1.5 ** (i + 1) for i in range(MORE_STRENGTHS)]
    dearest = 0.0
    for i, strength in enumerate(strengths):
        if i >= len(bench.config.dense_strengths) and dearest >= latent.cost.value:
            return
        steer, positions = Steer(direction, strength), bench.config.positions
        steering = intervene(bench.lm, None, [steer], hook=sae.hook, positions=positions)
        arm = bench.run("difference of means", steering, strength=strength)
        dearest = max(dearest, arm.cost.value)
        yield arm


def _best(arms: Sequence[Arm], config: SweepConfig) -> Arm:
    """The cheapest of those whose rate is about the highest that is affordable; if none is, the cheapest of all."""
    affordable = [arm for arm in arms if arm.cost.value <= config.max_cost] or [min(arms, key=lambda a: a.cost.value)]
    highest = max(arm.rate.value for arm in affordable)
    return min((arm for arm in affordable if arm.rate.value >= highest - config.slack), key=lambda arm: arm.cost.value)


def _equal_cost(dense: Sequence[Arm], latent: Arm) -> float:
    """The strength of the difference of means that costs what the latent does: log-linear between those tried."""
    strengths = [0.0, *(arm.strength or 0.0 for arm in dense)]
    costs = np.maximum.accumulate([0.0, *(math.log(arm.cost.value) for arm in dense)])
    return round(float(np.interp(math.log(max(latent.cost.value, 1.0)), costs, strengths)), 4)
