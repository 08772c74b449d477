"""A panel read over checkpoints, beside what a judge says of their behaviour.

Whether it tells misaligned models from aligned ones counts only on fine-tunes that did not choose it: those that did
are left out of the AUROC of ``track``; ``track_unseen`` leaves out one group (a domain of fine-tuning data) at a time,
chooses the panel on the others, and scores the group with it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from sae_persona.activations.lm import LM
from sae_persona.attribution.association import Interval
from sae_persona.attribution.tables import aligned, from_json, shown, to_json
from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.runs import read_json, whole, write_json
from sae_persona.sae.model import SAE
from sae_persona.studies.panel import MEANS, Panel, PanelConfig, choose_panel
from sae_persona.studies.readings import Prompt, Reading, check_comparable, read_prompted
from sae_persona.studies.separation import auroc, auroc_gain, correlation
from sae_persona.studies.snapshots import Snapshot, last_of_each
from sae_persona.types import HookPoint

FORMAT, KIND = 1, "track"
_FACTS = ("name", "step", "dose", "group", "family", "seed", "benign", "misaligned")


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """How scores are held against behaviour."""

    misaligned_above: float = 0.3
    """Judged rate above which a model counts as misaligned."""
    resamples: int = 1000
    """Draws of fine-tunes, for the interval of the gain over the difference of means."""
    batch: int = 32
    """Prompts a forward pass."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if min(self.resamples, self.batch) < 1 or not 0 <= self.misaligned_above < 1:
            raise ConfigError(
                "resamples and batch are at least 1 and misaligned_above a rate, "
                f"got {self.resamples}, {self.batch}, {self.misaligned_above}"
            )


@dataclass(frozen=True)
class Scored:
    """One checkpoint: what is known of it, and its score in every measure with an interval over prompts."""

    name: str
    step: int | None
    dose: float | None
    group: str
    family: str
    seed: int | None
    benign: bool
    misaligned: Interval
    is_misaligned: bool | None
    scores: dict[str, Interval]
    seen: bool = False
    """Its fine-tune had a part in choosing the panel."""

    @classmethod
    def of(cls, one: Snapshot, scores: dict[str, Interval], above: float, *, seen: bool) -> Self:
        facts = {name: getattr(one, name) for name in _FACTS}
        return cls(**facts, is_misaligned=one.is_misaligned(above), scores=scores, seen=seen)


@dataclass(frozen=True)
class Telling:
    """How one measure tells misaligned fine-tunes from aligned ones, by their last checkpoints."""

    measure: str
    n_misaligned: int
    n_aligned: int
    auroc: Interval
    gain: Interval
    """AUROC minus that of the difference of means, over fine-tunes drawn with replacement; NaN without one."""
    pearson: float
    """With the judged rate, over all checkpoints."""
    spearman: float


@dataclass(frozen=True)
class Track:
    """Checkpoints with their scores."""

    panel: str
    config: dict[str, Any]
    rows: tuple[Scored, ...]
    telling: tuple[Telling, ...]

    def __getitem__(self, measure: str) -> Telling:
        return next(one for one in self.telling if one.measure == measure)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": KIND, **to_json(self)}

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
            telling = tuple(Telling(**from_json(row, ["auroc", "gain"])) for row in raw["telling"])
            return cls(raw["panel"], raw["config"], tuple(_scored(row) for row in raw["rows"]), telling)

    def __str__(self) -> str:
        names = list(self.rows[0].scores)[:1] + [name for name in self.rows[0].scores if name == MEANS]
        table = [["checkpoint", "step", "dose", "misaligned", *names, ""]]
        for row in self.rows:
            cells = [row.name, _or(row.step), _or(row.dose), _rate(row.misaligned)]
            table.append([*cells, *(shown(row.scores[n], 2, "+") for n in names), "seen" if row.seen else ""])
        told = [["tells misaligned from aligned", "AUROC", "gain over means", "Pearson", "Spearman"]]
        told += [
            [
                t.measure,
                shown(t.auroc),
                "" if math.isnan(t.gain.value) else shown(t.gain, 3, "+"),
                f"{t.pearson:.2f}",
                f"{t.spearman:.2f}",
            ]
            for t in self.telling
        ]
        first = self.telling[0]
        counts = (
            f"{first.n_misaligned} misaligned and {first.n_aligned} aligned fine-tunes that did not choose the panel"
        )
        return "\n".join([self.panel, *aligned(table), "", counts, *aligned(told)])


def track(
    panel: Panel, snapshots: Sequence[Snapshot], config: TrackConfig | None = None, *, base: LM | None = None,
    device: str = "cpu", on_each: Callable[[Scored], None] | None = None,
) -> Track:  # fmt: skip
    """Score every checkpoint, opened one after the other.

    base      the panel's model, to check that each is of its architecture and tokenizer
    on_each   hears of each checkpoint as it is scored

    Errors as ``Panel.score``; DataError for no checkpoints.
    """
    config = config or TrackConfig()
    rows = []
    for one in snapshots:
        lm = one.open(device)
        if base is not None:
            check_comparable(base, lm)
        scores = panel.score(lm, batch=config.batch)
        rows.append(Scored.of(one, scores, config.misaligned_above, seen=one.name in panel.chosen_on))
        if on_each is not None:
            on_each(rows[-1])
    return _track(str(panel), config, rows)


def track_unseen(
    base: LM,
    sae: SAE,
    prompts: Sequence[Prompt],
    snapshots: Sequence[Snapshot],
    config: TrackConfig | None = None,
    panel: PanelConfig | None = None,
    *,
    hook: HookPoint | None = None,
) -> Track:
    """Leave one group out at a time: choose the panel on the other groups' last checkpoints, score the group with it.

    Measures are the same in every fold by name: the chosen latents together, and the dense directions.
    DataError for fewer than two groups with misaligned fine-tunes; else as ``track``.
    """
    config, hook = config or TrackConfig(), hook or sae.hook
    before = read_prompted(base, hook, prompts, batch=config.batch)
    readings: dict[int, Reading] = {}
    for number, one in enumerate(snapshots):
        lm = one.open(str(base.device))
        check_comparable(base, lm)
        found = read_prompted(lm, hook, prompts, batch=config.batch)
        readings[number] = Reading(one.name, found.keys, found.x)
    return unseen(sae, hook, prompts, before, snapshots, readings, config, panel)


def unseen(
    sae: SAE,
    hook: HookPoint,
    prompts: Sequence[Prompt],
    before: Reading,
    snapshots: Sequence[Snapshot],
    readings: Mapping[int, Reading],
    config: TrackConfig,
    panel: PanelConfig | None = None,
) -> Track:
    """As ``track_unseen``, from readings by the snapshots' numbers."""
    truth = [one.is_misaligned(config.misaligned_above) for one in snapshots]
    last = {id(one) for one in last_of_each(snapshots)}
    bad_groups = sorted({one.group for one, bad in zip(snapshots, truth, strict=True) if bad and id(one) in last})
    if len(bad_groups) < 2:
        raise DataError(
            f"misaligned fine-tunes are of {len(bad_groups)} groups: two or more are needed, to choose on one and test "
            "on the other. Organisms' groups are their domains"
        )
    rows: list[Scored | None] = [None] * len(snapshots)
    panels = []
    for group in sorted({one.group for one in snapshots}):
        there = [i for i, one in enumerate(snapshots) if one.group != group and id(one) in last]
        bad, calm = ([readings[i] for i in there if truth[i] is wanted] for wanted in (True, False))
        chosen = choose_panel(sae, hook, prompts, before, bad, calm, panel)
        panels.append(f"without {group or 'those of no group'}: {', '.join(map(str, chosen.latents))}")
        for i, one in enumerate(snapshots):
            if one.group == group:
                scores = chosen.of_reading(readings[i])
                kept = {name: score for name, score in scores.items() if not name.startswith("latent ")}
                rows[i] = Scored.of(one, kept, config.misaligned_above, seen=False)
    return _track(f"latents chosen on other groups; {'; '.join(panels)}", config, [row for row in rows if row])


def _track(panel: str, config: TrackConfig, rows: Sequence[Scored]) -> Track:
    if not rows:
        raise DataError("there is no checkpoint to score")
    return Track(panel, asdict(config), tuple(rows), _telling(rows, config))


def _telling(rows: Sequence[Scored], config: TrackConfig) -> tuple[Telling, ...]:
    last: dict[str, Scored] = {}
    for row in rows:
        if row.name not in last or (row.step or 0) >= (last[row.name].step or 0):
            last[row.name] = row
    tested = [row for row in last.values() if not row.seen and row.is_misaligned is not None]
    y = np.array([bool(row.is_misaligned) for row in tested], bool)
    judged = np.array([row.misaligned.value for row in rows])
    numbers = {m: np.array([row.scores[m].value for row in tested]) for m in rows[0].scores}
    found = []
    for measure, values in numbers.items():
        gain = Interval(math.nan, math.nan, math.nan)
        if MEANS in numbers and measure != MEANS and y.any() and not y.all():
            gain = auroc_gain(values, numbers[MEANS], y, resamples=config.resamples, seed=config.seed)
        over_all = np.array([row.scores[measure].value for row in rows])
        area = auroc(values[y], values[~y])
        found.append(Telling(measure, int(y.sum()), int((~y).sum()), area, gain, *correlation(over_all, judged)))
    return tuple(found)


def _scored(raw: dict[str, Any]) -> Scored:
    def interval(parts: Sequence[float | None]) -> Interval:
        return Interval(*(math.nan if part is None else part for part in parts))

    scores = {name: interval(parts) for name, parts in raw["scores"].items()}
    return Scored(**{**raw, "misaligned": interval(raw["misaligned"]), "scores": scores})


def _or(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _rate(rate: Interval) -> str:
    return "" if math.isnan(rate.value) else shown(rate, 2)
