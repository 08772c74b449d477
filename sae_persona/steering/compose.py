"""Several traits at once: how their edits interfere, and the strengths at which all reach their targets.

Strengths are solved on development questions: traits and divergence are measured about the strengths at hand, the
program of `solver` gives better ones, and these are measured in turn. What was found is measured on test questions.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from sae_persona.attribution.association import Interval
from sae_persona.attribution.tables import shown
from sae_persona.errors import ConfigError
from sae_persona.steering.arms import plain
from sae_persona.steering.bench import check_apart
from sae_persona.steering.divergence import Readings
from sae_persona.steering.interference import Interference, Mix, interference, means
from sae_persona.steering.solver import LocalModel, Plan, Targets, plan, positive
from sae_persona.steering.strength import wilson

SMALL = 0.1
"""Share of its own strength at which an edit is measured that the program has left out, or almost."""


@dataclass(frozen=True, kw_only=True)
class ComposeConfig:
    """How strengths are solved for."""

    step: float = 0.25
    """Of the finite differences, as a share of the strength that an edit has alone: traits are read that far to both
    sides. A smaller one is nearer to the slope, and reads more noise."""
    high: float = 2.0
    """Highest strength, as a multiple of the one that an edit has alone."""
    rounds: int = 3
    """Times that the model is measured and solved, each about the best strengths so far, and believed half as far from
    them as before."""
    tolerance: float = 0.02
    """By how much of a rate a target may be missed and count as met: the cheapest strengths lie on the edge."""

    def __post_init__(self) -> None:
        if not 0 < self.step < 1 or not 0 <= self.tolerance < 1:
            raise ConfigError(f"step and tolerance lie between 0 and 1, got {self.step} and {self.tolerance}")
        if not 1 <= self.high < float("inf") or self.rounds < 1:
            raise ConfigError(f"high and rounds are at least 1, got {self.high} and {self.rounds}")


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Strengths for targets, and what they do.

    verdict   met: the targets are reached on the development questions. infeasible: no strengths reach them, by the
              last model. unmet: the model says that some do, and those that were tried do not
    """

    verdict: Literal["met", "infeasible", "unmet"]
    at_least: dict[str, float]
    at_most: dict[str, float]
    strengths: dict[str, float]
    """Of those that were measured, the cheapest that meet the targets, else those that miss by least."""
    predicted: dict[str, float] | None
    """By the model that gave these strengths; None where they are those that the edits have alone, which none gave."""
    measured: dict[str, float]
    """On the development questions."""
    predicted_kl: float | None
    """Mean divergence in nats, likewise."""
    shortfall: float
    """By how much the target that is missed most is missed, as measured."""
    reachable: dict[str, float]
    """Target -> the furthest that its trait goes whatever the others do, by the last model."""
    least_shortfall: float
    """The smallest by which all targets can be missed at once, by the last model; 0 if they can be met."""
    jacobian: dict[str, dict[str, float]]
    """Trait -> edit -> change of the trait's rate a unit of strength, by the last model."""

    def __str__(self) -> str:
        said = {
            "met": "the targets are met on development questions",
            "infeasible": "infeasible: by the slopes measured here, no strengths up to the highest miss "
            f"all targets by less than {self.least_shortfall:.2f}",
            "unmet": f"not met: the nearest strengths that were tried miss by {self.shortfall:.2f}",
        }
        lines = [said[self.verdict]]
        lines += [f"{target}: goes to {rate:.2f} at the furthest" for target, rate in self.reachable.items()]
        lines.append("strengths: " + ", ".join(f"{trait} {s:.3g}" for trait, s in self.strengths.items()))
        for trait, rate in self.measured.items():
            foretold = f"{self.predicted[trait]:.2f} predicted, " if self.predicted else ""
            lines.append(f"{trait}: {foretold}{rate:.2f} measured")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Composition:
    """What `compose` found.

    before, after   interference on test questions, at the strengths that the edits have alone and at the solved ones
    test            trait -> its rate on test questions at the solved strengths, or else at those of ``before``
    readings        how strong these are
    met             whether the targets are reached on the test questions, within the tolerance; None without targets
    shortfall       by how much the target that is missed most is missed there
    """

    before: Interference
    solution: Solution | None
    after: Interference | None
    test: dict[str, Interval]
    readings: Readings
    met: bool | None = None
    shortfall: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values; NaN becomes null."""
        return plain(asdict(self))

    def __str__(self) -> str:
        parts = [str(self.before)]
        if self.solution is not None:
            parts.append(str(self.solution))
        if self.after is not None:
            parts.append(str(self.after))
        rates = (f"{t}: {shown(r, 2)} on test questions" for t, r in self.test.items())
        if self.met is not None:
            missed = f"not met on test questions: missed by {self.shortfall:.2f}"
            parts.append("the targets are met on test questions" if self.met else missed)
        return "\n\n".join([*parts, "\n".join([*rates, str(self.readings)])])


def compose(
    development: Mix,
    test: Mix,
    targets: Targets | None = None,
    config: ComposeConfig | None = None,
    *,
    on_round: Callable[[dict[str, float], dict[str, float]], None] | None = None,
) -> Composition:
    """Measure how edits interfere and, given targets, solve for strengths that meet them at the least divergence.

    development, test   the same ingredients, on different questions
    on_round            is told of the strengths and the rates that each round found

    ConfigError or DataError for a target on a trait that the judge does not score, DataError for a question that is in
    both parts.
    """
    config = config or ComposeConfig()
    check_apart(development.bench.questions.texts, test.bench.questions.texts)
    traits: list[str] = [*dict.fromkeys([*development.names, *(targets.traits if targets else [])])]
    before = interference(test)
    solution = solve(development, targets, config, on_round=on_round) if targets else None
    after = None
    at = test.working
    if solution:
        at = np.array([solution.strengths[name] for name in test.names])
        after = interference(test, at) if (at > 0).all() else None
    rates = {trait: wilson(test.scores(trait, at), test.asked) for trait in traits}
    shortfall = targets.shortfall({trait: rate.value for trait, rate in rates.items()}) if targets else None
    return Composition(
        before=before,
        solution=solution,
        after=after,
        test=rates,
        readings=test.readings(at),
        met=None if shortfall is None else shortfall <= config.tolerance,
        shortfall=shortfall,
    )


def solve(
    mix: Mix,
    targets: Targets,
    config: ComposeConfig,
    *,
    on_round: Callable[[dict[str, float], dict[str, float]], None] | None = None,
) -> Solution:
    """Strengths that meet the targets at the least divergence, by rounds of measuring and solving."""
    traits: list[str] = [*dict.fromkeys([*mix.names, *targets.traits])]
    high = config.high * mix.working
    tried: list[tuple[np.ndarray, Plan | None]] = [(mix.working, None)]

    def order(one: tuple[np.ndarray, Plan | None]) -> tuple[float, float]:
        short = targets.shortfall(means(mix, traits, one[0]))
        return (short if short > config.tolerance else 0.0), mix.readings(one[0]).kl_mean

    everywhere = local = None
    for turn in range(config.rounds):
        at, _ = min(tried, key=order)
        local = local_model(mix, traits, at, config)
        everywhere = plan(local, targets, np.zeros_like(high), high)
        reach = mix.working / 2**turn
        step = plan(local, targets, np.maximum(at - reach, 0.0), np.minimum(at + reach, high))
        tried.append((np.round(step.strengths, 4), step))
        if on_round:
            on_round(*_told(mix, traits, tried[-1][0]))
    assert everywhere is not None and local is not None, "there is at least one round"
    best, plan_of = min(tried, key=order)
    _, measured = _told(mix, traits, best)
    shortfall = targets.shortfall(measured)
    return Solution(
        verdict="met" if shortfall <= config.tolerance else "unmet" if everywhere.feasible else "infeasible",
        at_least=dict(targets.at_least),
        at_most=dict(targets.at_most),
        strengths=_told(mix, traits, best)[0],
        predicted=plan_of.predicted if plan_of else None,
        measured=measured,
        predicted_kl=plan_of.divergence if plan_of else None,
        shortfall=shortfall,
        # a straight line does not know that a rate ends at 0 and 1
        reachable={target: min(1.0, max(0.0, rate)) for target, rate in everywhere.reachable.items()},
        least_shortfall=0.0 if everywhere.feasible else everywhere.shortfall,
        jacobian={
            trait: dict(zip(mix.names, row.tolist(), strict=True))
            for trait, row in zip(traits, local.jacobian, strict=True)
        },
    )


def _told(mix: Mix, traits: Sequence[str], at: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """Strengths and rates by name."""
    return dict(zip(mix.names, at.tolist(), strict=True)), dict(means(mix, traits, at))


def local_model(mix: Mix, traits: Sequence[str], at: np.ndarray, config: ComposeConfig) -> LocalModel:
    """Traits and divergence about the strengths ``at`` [n]: slopes by central differences, curvature from pairs."""
    slopes = []
    for i, step in enumerate(config.step * mix.working):
        up, down = at.copy(), at.copy()
        up[i] += step
        down[i] = max(0.0, down[i] - step)
        above, below = (means(mix, traits, s) for s in (up, down))
        slopes.append([(above[t] - below[t]) / (up[i] - down[i]) for t in traits])
    here = means(mix, traits, at)
    return LocalModel(
        traits=tuple(traits),
        at=at,
        rates=np.array([here[trait] for trait in traits]),
        jacobian=np.array(slopes).T,
        hessian=positive(_curvature(mix, np.maximum(at, SMALL * mix.working))),
    )


def _curvature(mix: Mix, at: np.ndarray) -> np.ndarray:
    """H of s^T H s / 2 that gives the mean divergence of each edit alone and of each pair, at these strengths."""
    n = len(at)

    def divergence(*chosen: int) -> float:
        return mix.readings(np.where(np.isin(np.arange(n), chosen), at, 0.0)).kl_mean

    alone = [divergence(i) for i in range(n)]
    h = np.diag(2 * np.array(alone) / at**2)
    for i in range(n):
        for j in range(i):
            h[i, j] = h[j, i] = (divergence(i, j) - alone[i] - alone[j]) / (at[i] * at[j])
    return h
