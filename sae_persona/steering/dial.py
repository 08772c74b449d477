"""One dial for any edit: the strength at which the steered model is a given divergence from the unsteered one.

Latents and directions, of any SAE and model, that are dialled to the same budget can be compared. Solved by false
position with the Illinois rule (Dowell and Jarratt, BIT 11, 1971) in log strength and log divergence, in which a
divergence that grows as a power of the strength is a straight line.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, DataError
from sae_persona.steering.apply import SAEs
from sae_persona.steering.divergence import DivergenceConfig, Readings, Track
from sae_persona.steering.interventions import Edit, Placed
from sae_persona.steering.positions import Positions, Spans
from sae_persona.types import HookPoint

MakeEdits = Callable[[float], Sequence[Edit | Placed]]
"""The edits at a strength."""
LEAP = 4.0
"""By how much the strength is multiplied or divided until the budget lies between two that were tried."""
NOTHING = 1e-9
"""Nats that stand for none at all, where a logarithm is taken."""


@dataclass(frozen=True, kw_only=True)
class DialConfig:
    """What a strength is solved for."""

    budget: float = 1.0
    """KL(steered || base) in nats that the strength is to reach: a percentile over greedy tokens."""
    low: float = 0.01
    """Lowest strength that is tried."""
    high: float = 16.0
    """Highest strength that is tried."""
    tolerance: float = 0.05
    """By which share of itself the budget may be missed."""
    max_steps: int = 12
    """Strengths that are tried at most."""
    reading: DivergenceConfig = field(default_factory=DivergenceConfig)
    """Where the divergence is read."""

    def __post_init__(self) -> None:
        if not 0 < self.budget < math.inf:
            raise ConfigError(f"a KL budget is a finite number of nats above 0, got {self.budget}: the default is 1")
        if not 0 < self.low < self.high < math.inf:
            raise ConfigError(f"strengths are tried from low to high, 0 < low < high, got {self.low} and {self.high}")
        if not 0 < self.tolerance < 1 or self.max_steps < 2:
            raise ConfigError(
                f"tolerance lies between 0 and 1 and max_steps is at least 2, got {self.tolerance} and {self.max_steps}"
            )


class OutOfReach(DataError):
    """No strength that may be tried meets the budget: all stay below it, the lowest is above it, or it is leapt over.

    strength, readings   what came nearest
    """

    def __init__(self, message: str, strength: float, readings: Readings) -> None:
        super().__init__(message)
        self.strength, self.readings = strength, readings


@dataclass(frozen=True, kw_only=True)
class Dial:
    """The strength that meets the budget, and how strong it is by every measure."""

    strength: float
    budget: float
    readings: Readings
    tried: tuple[tuple[float, float], ...]
    """Strengths that were tried, and the divergence at each: in order of strength."""

    @property
    def monotone(self) -> bool:
        """Whether more strength was more divergence; if not, other strengths may meet the budget, too."""
        return self.fall is None

    @property
    def fall(self) -> tuple[float, float] | None:
        """Two strengths between which the divergence falls, if there are any."""
        for (s, kl), (t, later) in zip(self.tried, self.tried[1:], strict=False):
            if later < kl * (1 - 1e-3):
                return s, t
        return None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "strength": self.strength,
            "budget": self.budget,
            "monotone": self.monotone,
            "tried": [list(pair) for pair in self.tried],
            "readings": self.readings.to_json(),
        }

    def __str__(self) -> str:
        lines = [f"strength {self.strength:.4g} for a budget of {self.budget:g} nats", str(self.readings)]
        if self.fall:
            lines.append(
                f"the divergence falls between strengths {self.fall[0]:.4g} and {self.fall[1]:.4g}: "
                "another strength may meet the budget, too"
            )
        return "\n".join(lines)


def solve_strength(
    lm: LM,
    saes: SAEs,
    make_edits: MakeEdits,
    prompts: Sequence[list[int]],
    config: DialConfig | None = None,
    *,
    hook: HookPoint | None = None,
    positions: Positions | Spans = "answer",
    track: Track | None = None,
) -> Dial:
    """Find the strength at which the divergence meets the budget.

    make_edits        the edits at a strength above 0; they act as in `intervene`, at ``hook`` and ``positions``
    prompts           token ids, each up to where the answer starts
    track             made of the same prompts before, to save its greedy answers

    OutOfReach (a DataError) where no strength reaches the budget, the lowest is above it already, or the divergence
    leaps over it; DataError where a logit is not finite.
    """
    config = config or DialConfig()
    track = track or Track(lm, prompts, config.reading)
    search = _Search(lambda s: track.read(saes, make_edits(s), hook=hook, positions=positions), config)
    strength = search.solve()
    tried = tuple((s, search.found[s].kl_tail) for s in sorted(search.found))
    return Dial(strength=strength, budget=config.budget, readings=search.found[strength], tried=tried)


class _Search:
    """Looks for the strength at which the divergence is the budget; keeps what was read on the way."""

    def __init__(self, read: Callable[[float], Readings], config: DialConfig) -> None:
        self.read, self.config = read, config
        self.found: dict[float, Readings] = {}

    def solve(self) -> float:
        below, above = self._bracket()
        if below == above:
            return below
        return self._illinois(below, above)

    def _gap(self, strength: float) -> float:
        """Log of the divergence over the budget; 0 where it is within the tolerance."""
        if strength not in self.found:
            self.found[strength] = self.read(strength)
        gap = math.log(max(self.found[strength].kl_tail, NOTHING) / self.config.budget)
        return 0.0 if abs(gap) <= math.log1p(self.config.tolerance) else gap

    def _bracket(self) -> tuple[float, float]:
        """A strength below the budget and one above it; twice the same if it meets it."""
        config = self.config
        strength = min(max(1.0, config.low), config.high)
        below = above = None
        while below is None or above is None:
            gap = self._gap(strength)
            if gap == 0:
                return strength, strength
            if gap < 0 and strength >= config.high:
                self._refuse_low()
            if gap > 0 and strength <= config.low:
                least = self.found[strength]
                raise OutOfReach(
                    f"the divergence is {least.kl_tail:.3g} nats already at strength {strength:g}, above "
                    f"the budget of {config.budget:g}: raise the budget, lower low, or add instead of setting",
                    strength,
                    least,
                )
            below, above = (strength, above) if gap < 0 else (below, strength)
            strength = min(strength * LEAP, config.high) if gap < 0 else max(strength / LEAP, config.low)
        return below, above

    def _refuse_low(self) -> NoReturn:
        strength, readings = max(self.found.items(), key=lambda pair: pair[1].kl_tail)
        raise OutOfReach(
            f"no strength up to {self.config.high:g} reaches {self.config.budget:g} nats: the largest divergence is "
            f"{readings.kl_tail:.3g} nats, at strength {strength:g}: lower the budget, or raise high",
            strength,
            readings,
        )

    def _illinois(self, below: float, above: float) -> float:
        x, y = math.log(below), math.log(above)
        g, h = self._gap(below), self._gap(above)
        last = 0  # which end moved last: one that stays twice counts half
        while len(self.found) < self.config.max_steps:
            middle = (x * h - y * g) / (h - g)
            gap = self._gap(math.exp(middle))
            if gap == 0:
                return math.exp(middle)
            if gap < 0:
                x, g, h, last = middle, gap, h / 2 if last < 0 else h, -1
            else:
                y, h, g, last = middle, gap, g / 2 if last > 0 else g, 1
        nearest = min(self.found, key=lambda s: (abs(self._gap(s)), s))
        raise OutOfReach(
            f"{self.config.max_steps} strengths do not meet {self.config.budget:g} nats: it lies between strengths "
            f"{math.exp(x):.4g} and {math.exp(y):.4g}: raise max_steps or the tolerance",
            nearest,
            self.found[nearest],
        )
