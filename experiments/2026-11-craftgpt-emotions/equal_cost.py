"""A latent against random latents, each clamped as hard as costs the same perplexity, on the same questions."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import LM
from sae_persona.steering.answers import AnswerConfig, answer, surprise
from sae_persona.steering.strength import Judge, Outcome, cost, gain, wilson
from sae_persona.steering.sweep import Messages

TOLERANCE = 0.03
"""How near, in the log of the perplexity ratio, a tried strength must be for the search to end."""
TRIES = 5
"""Strengths tried at most."""
FURTHEST = 12.0
"""Largest multiple of the first strength that is tried."""

Steering = Callable[[float], AbstractContextManager[None]]
"""Strength -> what steers with it."""


@dataclass(eq=False)
class Bench:
    """Answers one set of questions under an edit; the unsteered answers are written once."""

    lm: LM
    judge: Judge
    answers: AnswerConfig
    chats: Sequence[Messages]
    baseline: Outcome = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = [prompt_tokens(self.lm, chat) for chat in self.chats]
        self.texts = [chat[-1]["content"] for chat in self.chats]
        self.baseline = self.outcome(nullcontext())

    def outcome(self, steering: AbstractContextManager[None], prompts: list[list[int]] | None = None) -> Outcome:
        """What is written under ``steering``; ``prompts`` may be asked in place of the plain ones."""
        with steering:
            written = answer(self.lm, prompts or self.prompts, self.answers)
        found = surprise(self.lm, self.prompts, written)
        return Outcome.of(self.judge, self.texts, [a.text for a in written], found)

    def log_cost(self, outcome: Outcome) -> float:
        """Log of the ratio of perplexities, steered over unsteered."""
        return math.log(cost(outcome.surprise, self.baseline.surprise).value)

    def facts(self, outcome: Outcome, persona: str) -> dict[str, Any]:
        """Rate, gain and cost, each with its 95 % interval, and the rates of the other scores."""
        score, before = outcome.scores[persona], self.baseline.scores[persona]
        intervals = {
            "rate": wilson(score),
            "gain": gain(score, before),
            "cost": cost(outcome.surprise, self.baseline.surprise),
        }
        others = {name: _short(score.mean()) for name, score in sorted(outcome.scores.items()) if name != persona}
        return {**{name: [_short(x) for x in interval] for name, interval in intervals.items()}, "others": others}


def equal_cost(held: Bench, steering: Steering, *, target: float, start: float) -> tuple[float, Outcome]:
    """The tried strength whose log cost is nearest to ``target``, and what it wrote; at most FURTHEST * start.

    The cost is measured on the very answers that are judged, so that no cost is estimated from other questions.
    """
    tried: list[tuple[float, float]] = []
    outcomes: list[Outcome] = []
    value = start
    for _ in range(TRIES):
        outcomes.append(held.outcome(steering(value)))
        tried.append((value, held.log_cost(outcomes[-1])))
        if abs(tried[-1][1] - target) < TOLERANCE:
            break
        value = next_strength(tried, target, FURTHEST * start)
    best = min(range(len(tried)), key=lambda i: abs(tried[i][1] - target))
    return tried[best][0], outcomes[best]


def next_strength(tried: Sequence[tuple[float, float]], target: float, limit: float) -> float:
    """Where the cost should be ``target``: between the tried strengths that bracket it, else outwards.

    Between, the log of the strength is interpolated. Outwards, the cost is taken to grow with the square of the
    strength, and no step is longer than a factor 3.
    """
    points = sorted(tried)
    over = next((i for i, (_, found) in enumerate(points) if found >= target), None)
    if over is None or over == 0:
        value, found = points[-1] if over is None else points[0]
        factor = math.sqrt(target / found) if found > 0 else 3.0
        return min(value * min(max(factor, 1 / 3), 3.0), limit)
    (low, under), (high, above) = points[over - 1], points[over]
    share = (target - under) / (above - under)
    return low * (high / low) ** share


def against_random(
    held: Bench, persona: str, chosen: Outcome, others: dict[int, Steering], *, start: float
) -> dict[str, Any]:
    """Compare what one intervention wrote with ``others``, each at the strength that costs the same.

    p is that of a rank: (1 + others that reach our rate) / (n + 1).

    start   strength at which each search begins
    """
    target = max(held.log_cost(chosen), TOLERANCE)
    arms, scores = [], {}
    for latent, steering in others.items():
        strength, outcome = equal_cost(held, steering, target=target, start=start)
        scores[latent] = outcome.scores[persona]
        facts = {"value": strength, "rate": scores[latent].mean(), "cost": math.exp(held.log_cost(outcome))}
        arms.append({"latent": latent, **{name: _short(x) for name, x in facts.items()}})
    arms.sort(key=lambda arm: -arm["rate"])
    rates, costs = (np.array([arm[name] for arm in arms]) for name in ("rate", "cost"))
    reached = int((rates >= chosen.scores[persona].mean() - 1e-4).sum())
    best = arms[0]
    cheap = sum(math.log(arm["cost"]) < target - TOLERANCE for arm in arms)
    return {
        "n_random": len(arms),
        "random_reaching_it": reached,
        "p": _short((1 + reached) / (len(arms) + 1)),
        "random_rate": {"mean": _short(rates.mean()), "p95": _short(np.percentile(rates, 95)), "best": best["rate"]},
        "random_cost": {"mean": _short(costs.mean()), "sd": _short(costs.std()), "wanted": _short(math.exp(target))},
        "random_below_the_cost": cheap,
        "best_random": best["latent"],
        "minus_best_random": [_short(x) for x in gain(chosen.scores[persona], scores[best["latent"]])],
        "arms": arms,
    }


def _short(x: float) -> float:
    return round(float(x), 4)
