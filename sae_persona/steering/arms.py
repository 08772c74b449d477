"""What a sweep found: one arm for each way of steering, and the file that holds them."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sae_persona.attribution.association import Interval
from sae_persona.attribution.tables import shown
from sae_persona.errors import FormatError
from sae_persona.runs import read_json, write_json
from sae_persona.steering.divergence import Readings
from sae_persona.steering.positions import Positions

FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of steering on one set of questions. Intervals are 95 %, over questions."""

    kind: str
    """baseline, latent, wrong sign (minus the latent's strength), random, difference of means, or prompt."""
    part: str
    """development or test."""
    strength: float | None
    latent: int | None
    rate: Interval
    """Share of answers that show the persona, by the judge."""
    gain: Interval
    """Rate minus the baseline's, paired."""
    cost: Interval
    """Perplexity under the unsteered model over the baseline's, paired."""
    perplexity: float
    valid: Interval
    side_effects: dict[str, float]
    """Other trait -> its rate minus the baseline's."""
    n: int
    """Answers."""
    n_questions: int
    """Different questions among them: with few, the intervals say little."""
    examples: tuple[tuple[str, str], ...]
    """(question, answer) pairs."""
    readings: Readings | None = None
    """How strong the steering is, on this part's questions; None for the baseline."""
    score: Interval | None = None
    """Steering score, 0 to 2; None where the judge marks neither instruction nor fluency."""
    ce: Interval | None = None
    """Cross entropy on held-out text, edited at every token, minus the unsteered model's, in nats; None: not read."""
    unread: int = 0
    """Answers of which the judge could not say something."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What clamping a persona's latent does, beside its controls."""

    persona: str
    latent: int
    unit: float
    strength: float
    """Chosen on the development questions."""
    positions: Positions
    config: dict[str, Any]
    arms: tuple[Arm, ...]

    def arm(self, kind: str, *, part: str = "test", strength: float | None = None) -> Arm:
        """The first such arm. LookupError if there is none."""
        for arm in self.arms:
            if arm.kind == kind and arm.part == part and strength in (None, arm.strength):
                return arm
        raise LookupError(f"no {kind} arm in this sweep")

    @property
    def chosen(self) -> Arm:
        """The latent at the chosen strength, on the test questions."""
        return self.arm("latent", strength=self.strength)

    @property
    def randoms(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.kind == "random"]

    def __str__(self) -> str:
        lines = [f"{self.persona}: latent {self.latent} clamped to {self.strength:g} x p99.9 at {self.positions!r}", ""]
        lines.append(f"{'arm':32}{'rate':>22}{'perplexity x':>22}{'valid':>8}{'KL p95':>8}{'score':>7}")
        for arm in self.arms:
            if arm.part == "test":
                name = arm.kind + (f" {arm.latent}" if arm.latent is not None else "")
                name += f" at {arm.strength:g}" if arm.strength is not None else ""
                mark = " *" if arm is self.chosen else ""
                kl = f"{arm.readings.kl_tail:.2f}" if arm.readings else "-"
                score = f"{arm.score.value:.2f}" if arm.score else "-"
                columns = f"{shown(arm.rate, 2):>22}{shown(arm.cost, 2):>22}{arm.valid.value:>8.2f}{kl:>8}{score:>7}"
                lines.append(f"{name + mark:32}{columns}")
        if unread := sum(arm.unread for arm in self.arms):
            lines.append(f"the judge could not say something of {unread} answers, which are left out there")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; NaN becomes null."""
        return {"format": FORMAT, **plain(asdict(self))}

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote. FormatError if it is missing, corrupt or of another format."""
        raw = read_json(path, "sweep")
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise FormatError(f"{path} is not a sweep of format {FORMAT}: sweep again")
        try:
            return cls(**{**raw, "arms": tuple(_arm(arm) for arm in raw["arms"])})
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is not a whole sweep ({error}): sweep again") from error


def plain(value: Any) -> Any:
    """JSON values without NaN and infinities, which become null."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _arm(raw: dict[str, Any]) -> Arm:
    def interval(values: Any) -> Interval:
        return Interval(*(math.nan if value is None else value for value in values))

    names = ("rate", "gain", "cost", "valid", "score", "ce")
    intervals = {name: interval(raw[name]) for name in names if raw[name] is not None}
    readings = None if raw["readings"] is None else Readings.from_json(raw["readings"])
    examples = tuple((question, text) for question, text in raw["examples"])
    return Arm(**{**raw, **intervals, "examples": examples, "readings": readings})
