"""Strengths that bring traits to their targets at the least divergence, by a local model of both.

    traits       T(s) = T(at) + J (s - at)
    divergence   KL(s) = s^T H s / 2
    minimise KL(s)  subject to  T(s) >= at_least, T(s) <= at_most, low <= s <= high

A convex quadratic program in as many unknowns as there are edits. Whether it has a solution is a linear program: the
smallest t by which all targets are missed at once. Above 0 there is none, and its optimum is the nearest there is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sae_persona.errors import ConfigError

ENOUGH = 1e-7
"""Of a trait's score: what a target may be missed by."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Trait -> what its mean score is to be at least, or at most; in [0, 1]. ConfigError unless there is one."""

    at_least: Mapping[str, float]
    at_most: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.at_least and not self.at_most:
            raise ConfigError("give at least one target: --at-least TRAIT=RATE or --at-most TRAIT=RATE")
        for trait, rate in [*self.at_least.items(), *self.at_most.items()]:
            if not 0 <= rate <= 1:
                raise ConfigError(f"a target is a rate from 0 to 1, got {trait}={rate}")
        for trait in self.at_least.keys() & self.at_most.keys():
            if self.at_least[trait] > self.at_most[trait]:
                low, high = self.at_least[trait], self.at_most[trait]
                raise ConfigError(f"{trait} cannot be at least {low:g} and at most {high:g}: swap them")

    @property
    def traits(self) -> list[str]:
        """Each once, in the order given."""
        return list(dict.fromkeys([*self.at_least, *self.at_most]))

    def shortfall(self, rates: Mapping[str, float]) -> float:
        """By how much the target that is missed most is missed; 0 where all are met."""
        missed = [target - rates[trait] for trait, target in self.at_least.items()]
        missed += [rates[trait] - target for trait, target in self.at_most.items()]
        return max(0.0, *missed)


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalModel:
    """Traits and divergence about one point.

    at        [n]      strengths
    rates     [m]      of the traits at that point
    jacobian  [m, n]   of the traits, a unit of strength
    hessian   [n, n]   of the divergence in nats, symmetric, at least 0
    """

    traits: tuple[str, ...]
    at: np.ndarray
    rates: np.ndarray
    jacobian: np.ndarray
    hessian: np.ndarray

    def predict(self, strengths: np.ndarray) -> dict[str, float]:
        """The traits at other strengths; a straight line, so they may leave [0, 1]."""
        rates = self.rates + self.jacobian @ (strengths - self.at)
        return {trait: float(rate) for trait, rate in zip(self.traits, rates, strict=True)}

    def divergence(self, strengths: np.ndarray) -> float:
        return float(strengths @ self.hessian @ strengths / 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What the program answers.

    feasible    whether all targets can be met at once, by the model
    strengths   [n] the cheapest that meet them; where none do, those that miss by least
    shortfall   by how much the targets are then missed
    reachable   target -> the furthest that its trait goes, whatever the others do
    """

    feasible: bool
    strengths: np.ndarray
    predicted: dict[str, float]
    divergence: float
    shortfall: float
    reachable: dict[str, float]


def plan(model: LocalModel, targets: Targets, low: np.ndarray, high: np.ndarray) -> Plan:
    """Solve for strengths from ``low`` to ``high`` [n] each. ConfigError for a target on a trait that is not there."""
    from scipy.optimize import linprog, minimize

    rows, wanted, reachable = _constraints(model, targets, low, high)
    n = len(high)
    # the largest shortfall t as one more unknown
    slack = linprog(
        np.r_[np.zeros(n), 1.0], A_ub=-np.c_[rows, np.ones(len(rows))], b_ub=-wanted,
        bounds=[*zip(low, high, strict=True), (0.0, None)],
    )  # fmt: skip
    assert slack.success, f"a program whose slack is free has a solution: {slack.message}"
    strengths, shortfall = slack.x[:n], float(slack.x[n])
    feasible = shortfall <= ENOUGH
    if feasible:
        # strengths as shares of their range and a divergence of about 1, so that the tolerance means the same for all
        scale = np.maximum(high, 1e-12)
        h = model.hessian * np.outer(scale, scale)
        h = h / max(np.abs(h).max(), 1e-30)
        found = minimize(
            lambda u: u @ h @ u / 2, strengths / scale, jac=lambda u: h @ u, method="SLSQP",
            bounds=[*zip(low / scale, high / scale, strict=True)], options={"ftol": 1e-12, "maxiter": 500},
            constraints={"type": "ineq", "fun": lambda u: rows @ (u * scale) - wanted, "jac": lambda u: rows * scale},
        )  # fmt: skip
        assert found.success, f"a convex program with a feasible start has a solution: {found.message}"
        strengths = np.clip(found.x * scale, low, high)
    return Plan(
        feasible=feasible,
        strengths=strengths,
        predicted=model.predict(strengths),
        divergence=model.divergence(strengths),
        shortfall=shortfall,
        reachable=reachable,
    )


def _constraints(
    model: LocalModel, targets: Targets, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """rows [c, n] and wanted [c] such that rows @ s >= wanted, and how far each trait goes in the box."""
    rows, wanted, reachable = [], [], {}
    for sign, group in ((1.0, targets.at_least), (-1.0, targets.at_most)):
        for trait, target in group.items():
            if trait not in model.traits:
                raise ConfigError(f"no trait {trait} was measured: there are {', '.join(model.traits)}")
            k = model.traits.index(trait)
            slope = model.jacobian[k]
            at_zero = model.rates[k] - slope @ model.at
            rows.append(sign * slope)
            wanted.append(sign * (target - at_zero))
            name = f"{trait} {'>=' if sign > 0 else '<='} {target:g}"
            reachable[name] = float(at_zero + sign * np.maximum(sign * slope * low, sign * slope * high).sum())
    return np.array(rows), np.array(wanted), reachable


def positive(hessian: np.ndarray) -> np.ndarray:
    """The nearest symmetric matrix without negative eigenvalues: what noise has put below 0 becomes next to nothing."""
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    return (vectors * np.maximum(values, 1e-6 * np.abs(values).max())) @ vectors.T
