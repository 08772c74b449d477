"""Induce: the latents that reverse misalignment, clamped the other way in the base model, make it misaligned.

A dose is a clamp in units of each latent's 90th percentile; latents that fell in the fine-tune are clamped as far below
0. Beside them stand sets of random latents that fire about as often, clamped at the same doses to the same activations.
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
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.apply import intervene
from sae_persona.steering.controls import matched_latents
from sae_persona.steering.interventions import Clamp, Placed
from sae_persona.steering.positions import Positions, check_positions
from sae_persona.steering.strength import Judge, gain, wilson
from sae_persona.studies.candidates import Candidate, MeasuredSAE
from sae_persona.studies.development import parts_of
from sae_persona.studies.exams import Marks, marks
from sae_persona.types import HookPoint

FORMAT, KIND = 1, "induction"


@dataclass(frozen=True, kw_only=True)
class InduceConfig:
    """How doses are tried."""

    doses: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)
    """Clamps, in units of each latent's 90th percentile."""
    n_induce_random: int = 3
    """Sets of random latents."""
    min_valid: float = 0.75
    """Lowest share of valid answers at which a dose counts."""
    induce_positions: Positions = "answer"
    """Tokens that are edited."""

    def __post_init__(self) -> None:
        check_positions(self.induce_positions)
        if not self.doses or not all(0 < dose < math.inf for dose in self.doses):
            raise ConfigError(f"doses are finite and above 0, got {', '.join(map(str, self.doses)) or 'none'}")
        if self.n_induce_random < 0 or not 0 <= self.min_valid <= 1:
            raise ConfigError(
                f"n_induce_random is at least 0 and min_valid a share, got {self.n_induce_random} and {self.min_valid}"
            )


@dataclass(frozen=True)
class Dose:
    """The base model at one dose. Intervals are 95 %, over questions."""

    dose: float
    rates: dict[str, Interval]
    """Share of misaligned answers: in domain, out of domain, open, as far as they are asked."""
    gain: Interval
    """Over all questions, minus the base's at dose 0, paired."""
    valid: Interval
    random: dict[str, tuple[float, ...]]
    """The same shares under each set of random latents."""
    random_gains: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Induction:
    """A dose curve. ``latents`` are those that were clamped, each named with its hook point."""

    model: str
    latents: tuple[str, ...]
    doses: tuple[Dose, ...]
    """The first is 0."""
    config: dict[str, Any]

    @property
    def counted(self) -> list[Dose]:
        """Doses above 0 at which answers still are answers, as far as the judge can say."""
        least = self.config["min_valid"]
        return [one for one in self.doses if one.dose > 0 and not one.valid.value < least]

    @property
    def best(self) -> Dose | None:
        """The dose that misaligns most of those that count."""
        return max(self.counted, key=lambda one: one.gain.value, default=None)

    @property
    def induces(self) -> bool:
        """Whether a dose that counts misaligns for certain, and more than any random set does at it."""
        best = self.best
        if best is None or not best.random_gains:  # without controls nothing is shown
            return False
        return best.gain.low > 0 and best.gain.value > max(best.random_gains)

    def to_json(self) -> dict[str, Any]:
        follows = {"induces": self.induces}
        return {"format": FORMAT, "kind": KIND, **follows, **to_json(asdict(self))}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """What ``to_json`` gives. KeyError or TypeError for anything else."""
        doses = tuple(_dose(one) for one in raw["doses"])
        return cls(model=raw["model"], latents=tuple(raw["latents"]), doses=doses, config=raw["config"])

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote. FormatError for anything else."""
        raw = read_json(Path(path), KIND)
        if not isinstance(raw, dict) or (raw.get("kind"), raw.get("format")) != (KIND, FORMAT):
            raise FormatError(f"{path} is not an {KIND} of format {FORMAT}: make it again")
        with whole(path, KIND):
            return cls.from_json(raw)

    def __str__(self) -> str:
        parts = list(self.doses[0].rates)
        rows = [["dose", *(column for name in parts for column in (name, "random")), "valid"]]
        for one in self.doses:
            cells = [
                text
                for name in parts
                for text in (shown(one.rates[name], 2), ", ".join(f"{r:.2f}" for r in one.random.get(name, ())))
            ]
            rows.append([f"{one.dose:g}", *cells, shown(one.valid, 2)])
        word = "misaligns" if self.induces else "does not misalign for certain, and beyond random latents,"
        head = f"clamping {', '.join(self.latents)} up {word} {self.model}"
        return "\n".join([head, *aligned(rows)])


def _dose(raw: Mapping[str, Any]) -> Dose:
    found = from_json(raw, ["gain", "valid"])
    found["rates"] = from_json(raw["rates"], list(raw["rates"]))
    found["random"] = {name: _numbers(values) for name, values in raw["random"].items()}
    found["random_gains"] = _numbers(raw["random_gains"])
    return Dose(**found)


def _numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else value for value in values)


def _value(rates: Mapping[str, Interval], name: str) -> float:
    return float(rates[name].value) if name in rates else math.nan


def induce(
    base: LM,
    sites: Mapping[HookPoint, MeasuredSAE],
    latents: Sequence[Candidate],
    questions: Sequence[Mapping[str, Any]],
    judge: Judge,
    config: InduceConfig | None = None,
    *,
    domain: str = "",
    answers: AnswerConfig | None = None,
    on_dose: Callable[[Dose], None] | None = None,
) -> Induction:
    """Clamp latents up in the base model, at every dose, beside random ones.

    latents     as `candidates.drift` gives them; those with a negative rise are clamped below 0
    questions   rows as `exams.exam` takes them, and ``domain`` is the one that is in domain

    ConfigError without latents; DataError if the judge reads no answer, or a site's latents were never measured.
    """
    config, answers = config or InduceConfig(), answers or AnswerConfig(batch=256)
    if not latents:
        raise ConfigError("there is no latent to clamp up: give one")
    saes = {hook: site.sae for hook, site in sites.items()}
    base_marks = marks(base, questions, judge, config=answers)
    if np.isnan(base_marks.misaligned).all():
        raise DataError("the judge can read no answer to these questions: choose one that knows them")
    sets = [list(latents), *_random_sets(sites, latents, config)]
    doses = [_read(0.0, base_marks, base_marks, [], domain)]
    for dose in sorted(config.doses):
        found = [
            _asked(base, saes, [_clamp(one, dose, config) for one in chosen], questions, judge, answers)
            for chosen in sets
        ]
        doses.append(_read(dose, found[0], base_marks, found[1:], domain))
        if on_dose:
            on_dose(doses[-1])
    names = tuple(one.name for one in latents)
    return Induction(model=base.name, latents=names, doses=tuple(doses), config=asdict(config))


def _clamp(one: Candidate, dose: float, config: InduceConfig) -> Placed:
    edit = Clamp(one.latent, dose if one.rise > 0 else -dose, one.unit)
    return Placed(edit=edit, hook=one.hook, positions=config.induce_positions)


def _asked(
    lm: LM,
    saes: Mapping[HookPoint, SAE],
    edits: Sequence[Placed],
    questions: Sequence[Mapping[str, Any]],
    judge: Judge,
    answers: AnswerConfig,
) -> Marks:
    with intervene(lm, saes, edits):
        return marks(lm, questions, judge, config=answers)


def _random_sets(
    sites: Mapping[HookPoint, MeasuredSAE], latents: Sequence[Candidate], config: InduceConfig
) -> list[list[Candidate]]:
    """Latents that fire about as often, each with the unit of the one that it stands for."""
    taken = {hook: [one.latent for one in latents if one.hook == hook] for hook in sites}
    columns = []
    for one in latents:
        stats = sites[one.hook].stats
        if stats is None:
            raise DataError(f"the latents at {one.hook} were measured on nothing: random ones like them are not known")
        rates = np.maximum(stats.firing_rate.cpu().numpy(), 1e-9 / max(stats.n_tokens, 1))
        picked = matched_latents(rates, taken[one.hook], one.latent, config.n_induce_random, seed=0)
        taken[one.hook] += picked
        columns.append([Candidate(one.hook, i, one.rise, one.unit, math.nan, math.nan) for i in picked])
    return [list(row) for row in zip(*columns, strict=False)]


def _read(dose: float, found: Marks, base: Marks, random: Sequence[Marks], domain: str) -> Dose:
    def rates(one: Marks) -> dict[str, Interval]:
        return {name: wilson(one.misaligned[rows], one.question[rows]) for name, rows in parts_of(one, domain).items()}

    by_set = [rates(one) for one in random]
    return Dose(
        dose=dose,
        rates=rates(found),
        gain=gain(found.misaligned, base.misaligned, found.question),
        valid=wilson(found.valid, found.question),
        random={name: tuple(_value(one, name) for one in by_set) for name in rates(found) if by_set},
        random_gains=tuple(float(gain(one.misaligned, base.misaligned, one.question).value) for one in random),
    )
