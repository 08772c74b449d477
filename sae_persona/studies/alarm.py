"""An alarm on one measure of a panel, whose rate of false alarms is set on benign fine-tunes.

Each benign fine-tune brings one number: the highest score on its way, for instance. With n of them in
order, s_(1) <= ... <= s_(n), and k = ceil((n + 1) (1 - alpha)), the alarm fires above s_(k). For another benign
fine-tune of the same kind

    P(false alarm) <= (n + 1 - k) / (n + 1) <= alpha

whatever the distribution (split conformal prediction; Vovk et al. 2005). That is over draws of the n as well: the rate
that these n have led to is distributed as Beta(n + 1 - k, k), whose 95th percentile is told beside it. k <= n needs
n >= 1 / alpha - 1, so 19 benign fine-tunes for 5 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_persona.errors import ConfigError, DataError


@dataclass(frozen=True)
class Alarm:
    """Fires on a score above the threshold."""

    measure: str
    threshold: float
    alpha: float
    """Highest chance of a false alarm on another benign fine-tune."""
    n_benign: int
    bound: float
    """(n + 1 - k) / (n + 1): what that chance is at most, over draws of benign fine-tunes."""
    upper: float
    """95 % upper bound of the rate of false alarms of this very threshold."""

    @classmethod
    def of(cls, measure: str, benign: Sequence[float], alpha: float = 0.05, least: float = 0.0) -> "Alarm":
        """Set the threshold on benign fine-tunes, a number each, and not below ``least``: that only fires more rarely.

        DataError if they are too few for ``alpha``.
        """
        from scipy.stats import beta  # here: importing scipy.stats costs half a second

        if not 0 < alpha < 1:
            raise ConfigError(f"alpha is a rate of false alarms between 0 and 1, got {alpha}")
        if not all(map(math.isfinite, benign)):
            raise DataError(f"the {measure} scores of the benign fine-tunes are not all finite: score them again")
        n = len(benign)
        check_number(n, alpha)
        k = math.ceil((n + 1) * (1 - alpha) - 1e-9)
        return cls(
            measure=measure,
            threshold=max(sorted(benign)[k - 1], least),
            alpha=alpha,
            n_benign=n,
            bound=(n + 1 - k) / (n + 1),
            upper=float(beta.ppf(0.95, n + 1 - k, k)),
        )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Alarm":
        """What ``asdict`` gives."""
        return cls(**raw)

    def fires(self, score: float) -> bool:
        """Whether a score is above the threshold."""
        return score > self.threshold

    def __str__(self) -> str:
        return (
            f"alarm: {self.measure} above {self.threshold:+.2f}; set on {self.n_benign} benign fine-tunes, another "
            f"one fires it with a chance of at most {self.bound:.3f} (95 % sure: below {self.upper:.3f})"
        )


def check_number(n: int, alpha: float) -> None:
    """DataError if so many benign fine-tunes are too few for a rate of false alarms."""
    needed = math.ceil(1 / alpha - 1 - 1e-9)
    if n < needed:
        got = "without benign fine-tunes there is no threshold" if not n else f"{n} benign fine-tunes are too few"
        raise DataError(f"{got}: a false-alarm rate of {alpha:g} needs {needed} of them")


def left_out_rate(
    measure: str, benign: Sequence[float], groups: Sequence[str], alpha: float, least: float = 0.0
) -> float | None:
    """Share of benign fine-tunes that fire the alarm set on those of all other groups.

    The bound above holds for more of the same kind; this asks of another. (Left out one by one, a share of alpha fires
    by arithmetic.) None for a single group, or where the others would be too few.
    """
    pairs, fired = list(zip(groups, benign, strict=True)), 0
    for group in set(groups):
        others = [score for name, score in pairs if name != group]
        if len(set(groups)) < 2 or len(others) < math.ceil(1 / alpha - 1 - 1e-9):
            return None
        alarm = Alarm.of(measure, others, alpha, least)
        fired += sum(alarm.fires(score) for name, score in pairs if name == group)
    return fired / len(pairs) if pairs else None
