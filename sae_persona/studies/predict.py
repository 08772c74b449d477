"""When an alarm fires, and when behaviour leaves the interval that it has in the base model: by step and by dose.

The alarm leads where it fires at an earlier checkpoint, or a smaller dose, than the first whose judged rate lies above
its baseline interval. It can only lead in being seen: that the latent moves first is no claim that it is the cause.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from sae_persona.attribution.association import Interval
from sae_persona.attribution.tables import aligned, shown, to_json
from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.runs import read_json, whole, write_json
from sae_persona.studies.alarm import Alarm, left_out_rate
from sae_persona.studies.panel import LATENTS
from sae_persona.studies.track import Scored

FORMAT, KIND = 1, "prediction"
By = Literal["step", "dose"]


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How an alarm is set."""

    measure: str = LATENTS
    """Of the panel: latents, "latent N", difference of means, ..."""
    alpha: float = 0.05
    """Highest chance of a false alarm on another benign fine-tune."""
    least: float = 0.25
    """The threshold is not below this many standard deviations: where no benign fine-tune ever rose above the base,
    rounding would fire the alarm."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha is a rate of false alarms between 0 and 1, got {self.alpha}")
        if not 0 <= self.least < math.inf:
            raise ConfigError(f"least is a number of standard deviations, 0 or more, got {self.least}")


@dataclass(frozen=True)
class Lead:
    """One series of checkpoints: the steps of a fine-tune, or the doses of one domain.

    alarm, behaviour   the first step or dose at which the alarm fires, and at which the judged rate is above its
                       baseline interval; None where it never is
    rate               judged rate where the alarm first fires
    """

    name: str
    by: By
    values: tuple[float, ...]
    alarm: float | None
    behaviour: float | None
    rate: Interval
    baseline: Interval

    @property
    def leads(self) -> bool:
        """The alarm fires while behaviour is still inside its baseline interval, and behaviour leaves it later."""
        return self.alarm is not None and self.behaviour is not None and self.alarm < self.behaviour


@dataclass(frozen=True)
class Prediction:
    """An alarm, and what it would have told."""

    alarm: Alarm
    left_out: float | None
    """Share of the benign fine-tunes that fire the alarm set on those of other groups; None if those are too few."""
    leads: tuple[Lead, ...]
    note: str = ""
    """What whoever reads it has to know."""

    @property
    def n_leads(self) -> int:
        return sum(lead.leads for lead in self.leads)

    def to_json(self) -> dict[str, Any]:
        leads = [to_json(lead) | {"leads": lead.leads} for lead in self.leads]
        return {
            "format": FORMAT, "kind": KIND, "alarm": asdict(self.alarm), "left_out": self.left_out, "leads": leads,
            "note": self.note
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote. FormatError for anything else."""
        raw = read_json(Path(path), KIND)
        if not isinstance(raw, dict) or (raw.get("kind"), raw.get("format")) != (KIND, FORMAT):
            raise FormatError(f"{path} is not a {KIND} of format {FORMAT}: make it again")
        with whole(path, KIND):
            leads = []
            for row in raw["leads"]:
                read: dict[str, Any] = {name: row[name] for name in ("name", "by", "alarm", "behaviour")}
                for name in ("rate", "baseline"):
                    read[name] = Interval(*(math.nan if v is None else v for v in row[name]))
                leads.append(Lead(**read, values=tuple(row["values"])))
            return cls(Alarm.from_json(raw["alarm"]), raw["left_out"], tuple(leads), raw["note"])

    def __str__(self) -> str:
        left = "" if self.left_out is None else f"; {self.left_out:.1%} of them fire one set on the other groups"
        rows = [["series", "by", "alarm at", "behaviour leaves at", "rate at the alarm", "baseline", ""]]
        for lead in self.leads:
            told = "alarm first" if lead.leads else "no lead" if lead.behaviour is not None else "behaviour stays"
            firsts = ["never" if value is None else f"{value:g}" for value in (lead.alarm, lead.behaviour)]
            rows.append([lead.name, lead.by, *firsts, _shown(lead.rate), _shown(lead.baseline), told])
        moved = sum(lead.behaviour is not None for lead in self.leads)
        tail = f"the alarm fires first in {self.n_leads} of {moved} series whose behaviour leaves its baseline interval"
        return "\n".join([f"{self.alarm}{left}", *aligned(rows), tail, *([self.note] if self.note else [])])


def predict(
    benign: Sequence[Scored], scored: Sequence[Scored], config: PredictConfig | None = None, *,
    baseline: Interval | None = None,
) -> Prediction:  # fmt: skip
    """Set the alarm on benign fine-tunes, and ask of the others when it fires.

    benign     their checkpoints; a fine-tune counts by its highest score, where it began (0, as the base) included
    scored     checkpoints of the fine-tunes that are asked about. Those with several steps are series by step; the last
               checkpoints of one group and seed, of three doses or more, are a series by dose
    baseline   the judged rate of the base with its interval; by default that of a series' own step 0 or dose 0, else of
               a checkpoint at step 0 of its group, else of one of family "base"

    DataError without enough benign fine-tunes, an unknown measure, or no series whose behaviour was judged; and for a
    benign fine-tune that chose the panel, which would be no fair draw.
    """
    config = config or PredictConfig()
    for row in (*benign, *scored):
        if config.measure not in row.scores:
            raise DataError(f"the panel does not measure {config.measure!r}: it has {', '.join(row.scores)}")
    highest = _peaks(benign, config.measure)
    peaks, groups = list(highest.values()), {row.name: row.group for row in benign}
    alarm = Alarm.of(config.measure, peaks, config.alpha, config.least)
    leads = [_lead(alarm, name, by, rows, baseline or _baseline(by, rows, scored)) for name, by, rows in series(scored)]
    found = tuple(lead for lead in leads if lead is not None)
    if not found:
        raise DataError(
            "no fine-tune has two judged checkpoints, or doses, and a baseline: give organisms with scores, or baseline"
        )
    left_out = left_out_rate(config.measure, peaks, [groups[name] for name in highest], config.alpha, config.least)
    return Prediction(alarm, left_out, found, _note(benign, found))


def _peaks(benign: Sequence[Scored], measure: str) -> dict[str, float]:
    """The highest score of each benign fine-tune. It began as the base, whose score is 0, so it is never below."""
    highest: dict[str, float] = {}
    for row in benign:
        if row.seen:
            raise DataError(f"{row.name} chose the panel, so it cannot set the alarm: give other benign fine-tunes")
        highest[row.name] = max(row.scores[measure].value, highest.get(row.name, 0.0))
    return highest


def _note(benign: Sequence[Scored], leads: Sequence[Lead]) -> str:
    """That benign fine-tunes were not looked at as often as those they are to calibrate."""
    steps = {value for lead in leads if lead.by == "step" for value in lead.values if value}
    missing = sorted(steps - {float(row.step) for row in benign if row.step is not None})
    if not missing:
        return ""
    shown = ", ".join(f"{step:g}" for step in missing[:6])
    return f"no benign fine-tune was looked at after steps {shown}: there the rate of false alarms is not known"


def series(rows: Sequence[Scored]) -> list[tuple[str, By, list[Scored]]]:
    """Checkpoints that belong on one axis, in its order: steps of a fine-tune, doses of a group."""
    runs: dict[str, list[Scored]] = defaultdict(list)
    for row in rows:
        runs[row.name].append(row)
    found: list[tuple[str, By, list[Scored]]] = []
    doses: dict[tuple[str, int], list[Scored]] = defaultdict(list)
    for name, run in runs.items():
        run.sort(key=lambda row: row.step or 0)
        if len({row.step for row in run}) > 1:
            found.append((name, "step", run))
        if run[-1].dose is not None and run[-1].family in ("mixture", "narrow", "benign", ""):
            doses[run[-1].group, run[-1].seed or 0].append(run[-1])
    for (group, seed), run in sorted(doses.items()):
        run.sort(key=lambda row: row.dose or 0)
        if len({row.dose for row in run}) > 2:
            found.append((f"{group or 'all'}, seed {seed}", "dose", run))
    return found


def _baseline(by: By, rows: Sequence[Scored], everything: Sequence[Scored]) -> Interval | None:
    """The judged rate of the base, from the checkpoint that is nearest to being it; None if there is none."""
    own = [row for row in rows if getattr(row, by) == 0]
    same = [row for row in everything if row.step == 0 and row.group == rows[0].group]
    base = [row for row in everything if row.family == "base"]
    return next((row.misaligned for row in (*own, *same, *base) if not math.isnan(row.misaligned.high)), None)


def _lead(alarm: Alarm, name: str, by: By, rows: Sequence[Scored], baseline: Interval | None) -> Lead | None:
    """None where nothing tells the baseline, or nobody has judged."""
    judged = [row for row in rows if not math.isnan(row.misaligned.value)]
    if baseline is None or len(judged) < 2:
        return None
    fired = next((row for row in judged if getattr(row, by) and alarm.fires(row.scores[alarm.measure].value)), None)
    left = next((row for row in judged if row.misaligned.value > baseline.high), None)
    return Lead(
        name, by, tuple(float(getattr(row, by)) for row in judged),
        None if fired is None else float(getattr(fired, by)),
        None if left is None else float(getattr(left, by)),
        Interval(math.nan, math.nan, math.nan) if fired is None else fired.misaligned,
        baseline,
    )  # fmt: skip


def _shown(rate: Interval) -> str:
    return "" if math.isnan(rate.value) else shown(rate, 2)
