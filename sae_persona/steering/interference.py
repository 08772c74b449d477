"""What the edit of one trait does to the others, and what all of them do together.

    I_ij = [T_j(edit i) - T_j(nothing)] / [T_j(edit j) - T_j(nothing)]
    composition error of trait j = T_j(all) - T_j(nothing) - sum over i of [T_j(edit i) - T_j(nothing)]

where T_j is the judge's mean score of trait j. On the diagonal I is 1; elsewhere 0 is no interference, 1 that edit i
does to trait j what j's own edit does, and below 0 that it works against it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sae_persona.attribution.association import Interval
from sae_persona.attribution.tables import shown
from sae_persona.errors import ConfigError, DataError
from sae_persona.steering.bench import Bench
from sae_persona.steering.dial import MakeEdits
from sae_persona.steering.divergence import DivergenceConfig, Readings, Track
from sae_persona.steering.interventions import Edit, Placed
from sae_persona.steering.strength import Outcome, bounds, resampled

UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ingredient:
    """A trait's edit, as a function of its strength, and the strength that it has alone.

    ConfigError for a strength that is not finite and above 0.
    """

    trait: str
    make: MakeEdits
    strength: float

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf:
            raise ConfigError(f"the edit for {self.trait} needs a finite strength above 0, got {self.strength}")


class Mix:
    """Several ingredients on one bench: what the traits and the divergence are at any strengths. Each is run once.

    At strength 0 an ingredient is left out. DataError where the judge never scores a trait on these questions.
    """

    def __init__(self, bench: Bench, ingredients: Sequence[Ingredient], reading: DivergenceConfig) -> None:
        self.bench, self.ingredients, self._reading = bench, tuple(ingredients), reading
        self.names = [one.trait for one in ingredients]
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"each trait has one edit, got {', '.join(self.names)}: give one for each")
        self.asked = np.array(bench.questions.texts)
        self._outcomes: dict[tuple[float, ...], Outcome] = {}
        self._readings: dict[tuple[float, ...], Readings] = {}

    @property
    def working(self) -> np.ndarray:
        """The strengths that the ingredients have alone: [n]."""
        return np.array([one.strength for one in self.ingredients])

    @cached_property
    def _track(self) -> Track:
        return Track(self.bench.lm, self.bench.questions.prompts, self._reading)

    def edits(self, strengths: Sequence[float] | np.ndarray) -> list[Edit | Placed]:
        pairs = zip(self.ingredients, strengths, strict=True)
        return [edit for one, strength in pairs if strength for edit in one.make(float(strength))]

    def outcome(self, strengths: Sequence[float] | np.ndarray) -> Outcome:
        """What the judge says of the answers at these strengths."""
        key = tuple(round(float(s), 9) for s in strengths)
        if key not in self._outcomes:
            self._outcomes[key] = self.bench.ask(self.edits(key))[0]
        return self._outcomes[key]

    def scores(self, trait: str, strengths: Sequence[float] | np.ndarray) -> np.ndarray:
        """A trait's scores [questions], NaN where the question cannot show it."""
        found = self.outcome(strengths).scores.get(trait)
        if found is None or np.isnan(found).all():
            raise DataError(f"the judge never scores {trait} on these questions: choose a judge that knows it")
        return found

    def readings(self, strengths: Sequence[float] | np.ndarray) -> Readings:
        """How strong the edits are at these strengths."""
        key = tuple(round(float(s), 9) for s in strengths)
        if key not in self._readings:
            bench = self.bench
            self._readings[key] = self._track.read(
                bench.saes, self.edits(key), hook=bench.hook, positions=bench.positions
            )
        return self._readings[key]


@dataclass(frozen=True, kw_only=True)
class Interference:
    """Of each trait's edit on each trait, with 95 % intervals from a paired bootstrap over questions."""

    traits: tuple[str, ...]
    strengths: tuple[float, ...]
    rates: tuple[tuple[float, ...], ...]
    """[n + 2][n] means of each trait: under nothing, each edit alone, and all of them."""
    matrix: tuple[tuple[Interval, ...], ...]
    """[i][j] = I_ij; NaN where the edit of j moves j by nothing that is certain, so that nothing can be compared."""
    composition: tuple[Interval, ...]
    """Composition error of each trait."""

    @property
    def mean_off_diagonal(self) -> float:
        """Mean of |I_ij| over i != j, of those that are known; NaN where none is."""
        n = range(len(self.traits))
        known = [abs(self.matrix[i][j].value) for i in n for j in n if i != j]
        known = [value for value in known if math.isfinite(value)]
        return float(np.mean(known)) if known else math.nan

    def __str__(self) -> str:
        width = max(14, *(len(trait) + 2 for trait in self.traits))
        head = "".join(f"{trait:>24}" for trait in self.traits)
        names = ["nothing", *(f"{t} {s:.3g}" for t, s in zip(self.traits, self.strengths, strict=True)), "all"]
        lines = [f"{'rate':{width + 6}}{head}"]
        for name, rates in zip(names, self.rates, strict=True):
            lines.append(f"{name:{width + 6}}" + "".join(f"{rate:>24.2f}" for rate in rates))
        lines += ["", f"{'interference':{width + 6}}{head}"]
        for trait, row in zip(self.traits, self.matrix, strict=True):
            lines.append(f"{'edit of ' + trait:{width + 6}}" + "".join(f"{shown(cell, 2, '+'):>24}" for cell in row))
        lines.append(
            f"{'composition error':{width + 6}}" + "".join(f"{shown(e, 2, '+'):>24}" for e in self.composition)
        )
        return "\n".join([*lines, f"mean off the diagonal: {self.mean_off_diagonal:.2f}"])


def interference(mix: Mix, strengths: Sequence[float] | np.ndarray | None = None, *, seed: int = 0) -> Interference:
    """Measure the edits alone and together; ``strengths`` [n] are by default those that they have alone."""
    at = mix.working if strengths is None else np.asarray(strengths, np.float64)
    n = len(at)
    runs = [np.zeros(n), *(np.where(np.arange(n) == i, at, 0.0) for i in range(n)), at]
    columns = [_trait(mix, trait, runs, seed) for trait in mix.names]
    return Interference(
        traits=tuple(mix.names),
        strengths=tuple(float(s) for s in at),
        rates=tuple(tuple(float(means[0, run]) for means, _ in columns) for run in range(n + 2)),
        matrix=tuple(tuple(_ratio(*columns[j], i, j) for j in range(n)) for i in range(n)),
        composition=tuple(_composition(*column) for column in columns),
    )


def _trait(mix: Mix, trait: str, runs: Sequence[np.ndarray], seed: int) -> tuple[np.ndarray, int]:
    """Means of a trait under each run, on the questions and then on bootstrap samples of them: [1 + samples, runs].

    And how many different questions these are.
    """
    scores = np.stack([mix.scores(trait, run) for run in runs], axis=1)
    known = ~np.isnan(scores).any(axis=1)
    if not known.any():
        raise DataError(f"no question is scored for {trait} under every edit: give more questions")
    counted = np.column_stack([scores[known], np.ones(known.sum())])
    totals = resampled(counted, mix.asked[known], seed)
    means = np.vstack([scores[known].mean(axis=0), totals[:, :-1] / totals[:, -1:]])
    return means, len(np.unique(mix.asked[known]))


def _ratio(means: np.ndarray, n_questions: int, i: int, j: int) -> Interval:
    own, other = means[:, 1 + j] - means[:, 0], means[:, 1 + i] - means[:, 0]
    low, high = bounds(own[1:], n_questions)
    if not (low > 0 or high < 0):
        return UNKNOWN
    ratios = other / np.where(own == 0, np.nan, own)
    return Interval(float(ratios[0]), *bounds(ratios[1:], n_questions))


def _composition(means: np.ndarray, n_questions: int) -> Interval:
    alone = (means[:, 1:-1] - means[:, :1]).sum(axis=1)
    errors = means[:, -1] - means[:, 0] - alone
    return Interval(float(errors[0]), *bounds(errors[1:], n_questions))


def means(mix: Mix, traits: Sequence[str], strengths: Sequence[float] | np.ndarray) -> Mapping[str, float]:
    """Mean score of each trait."""
    return {trait: float(np.nanmean(mix.scores(trait, strengths))) for trait in traits}
