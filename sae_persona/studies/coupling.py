"""A single trait pulls others along: steer or train each trait, measure all, and see what could have foretold it.

    e_ij = T_j(i) - T_j(nothing)

T_j is the judge's mean score of trait j, i the edit of trait i or a fine-tune on rows that show it. On the diagonal is
what an edit does to its own trait.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from sae_persona.attribution.association import Interval
from sae_persona.attribution.tables import aligned, from_json, shown, to_json
from sae_persona.errors import DataError, FormatError
from sae_persona.runs import read_json, whole, write_json
from sae_persona.steering.bench import Bench
from sae_persona.steering.interventions import Edit, Placed
from sae_persona.steering.strength import Outcome, gain
from sae_persona.studies.finetune import FinetuneConfig, finetune
from sae_persona.studies.foretelling import COLUMN, Foretold

FORMAT, KIND = 1, "coupling"
UNKNOWN = Interval(math.nan, math.nan, math.nan)
OnTrait = Callable[[str, str, Sequence[Interval]], object]


@dataclass(frozen=True)
class Effects:
    """What moving each trait does to all."""

    how: str
    """clamp: of its best latent; steer: of its difference of means; fine-tune: on rows that show it."""
    traits: tuple[str, ...]
    strengths: tuple[float, ...]
    """Of each edit, matched by divergence; NaN of fine-tunes."""
    base: tuple[float, ...]
    """T_j(nothing)."""
    matrix: tuple[tuple[Interval, ...], ...]
    """[i][j] = e_ij, paired over questions; NaN where the judge never scores j."""
    valid: tuple[Interval, ...]
    """What each does to the share of valid answers; NaN where the judge does not say."""
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> np.ndarray:
        """[n, n] fp64."""
        return np.array([[cell.value for cell in row] for row in self.matrix], np.float64)


@dataclass(frozen=True)
class Coupling:
    """Effects, each with what foretells it; relatedness: measure -> [n][n]."""

    model: str
    traits: tuple[str, ...]
    config: dict[str, Any]
    relatedness: dict[str, tuple[tuple[float, ...], ...]]
    effects: tuple[Effects, ...]
    foretold: tuple[tuple[Foretold, ...], ...]
    """One list for each of ``effects``."""

    def best(self, at: int = 0) -> Foretold | None:
        """The single measure that foretells best out of sample, of those that go with the coupling beyond chance: by
        Mantel's p, at 5 % over all measures. None if there is none."""
        single = [one for one in self.foretold[at] if not math.isnan(one.p)]
        sure = [one for one in single if one.p * len(single) <= 0.05]
        return max(sure, key=lambda one: one.r2.value, default=None)

    def is_foretold(self, at: int = 0) -> bool:
        """A single measure goes with the coupling beyond chance, and is better than nothing out of sample."""
        best = self.best(at)
        return best is not None and best.r2.value > 0

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
            return cls(
                raw["model"],
                tuple(raw["traits"]),
                raw["config"],
                {name: tuple(tuple(map(_number, row)) for row in rows) for name, rows in raw["relatedness"].items()},
                tuple(_effects(one) for one in raw["effects"]),
                tuple(tuple(Foretold(**from_json(o, ["spearman", "r2"])) for o in part) for part in raw["foretold"]),
            )

    def __str__(self) -> str:
        parts = []
        for i, (effects, foretold) in enumerate(zip(self.effects, self.foretold, strict=True)):
            parts += [_effects_text(effects), foretold_text(foretold), self.verdict(i)]
        return "\n\n".join(parts)

    def verdict(self, at: int = 0) -> str:
        """In one line."""
        best, how = self.best(at), self.effects[at].how
        if best is None:
            return f"{how}: coupling goes with no single measure beyond chance"
        column = next(one for one in self.foretold[at] if one.by == COLUMN)
        return (
            f"{how}: coupling goes with {best.by} beyond chance (Spearman {best.spearman.value:+.2f}, p {best.p:.2g}); "
            f"out of sample R2 {shown(best.r2, 2, '+')}, of the mean of j's column {column.r2.value:+.2f}"
        )


def steered_effects(
    how: str,
    bench: Bench,
    edits: Mapping[str, Sequence[Edit | Placed]],
    strengths: Sequence[float],
    *,
    notes: Sequence[str] = (),
    seed: int = 0,
    on_trait: OnTrait | None = None,
) -> Effects:
    """Ask every question under each trait's edit; the traits that are edited are those that are measured."""
    return _effects_of(
        how, list(edits), bench.ask([])[0], lambda trait: bench.ask(edits[trait])[0], bench, strengths, notes, seed,
        on_trait,
    )  # fmt: skip


def tuned_effects(
    bench: Bench,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    traits: Sequence[str],
    tuning: FinetuneConfig,
    *,
    seed: int = 0,
    on_trait: OnTrait | None = None,
) -> Effects:
    """Ask every question after a fine-tune on each trait's rows. DataError for a trait without rows."""
    if lost := [trait for trait in traits if not rows.get(trait)]:
        raise DataError(f"there are no rows to tune {lost[0]} on: give some for each trait")

    def tuned(trait: str) -> Outcome:
        (*_, (_, lm)) = finetune(bench.lm, rows[trait], tuning)
        return Bench(lm, None, bench.judge, bench.questions, bench.answers).ask([])[0]

    strengths = [math.nan] * len(traits)
    return _effects_of("fine-tune", traits, bench.ask([])[0], tuned, bench, strengths, (), seed, on_trait)


def _effects_of(
    how: str, traits: Sequence[str], before: Outcome, after: Callable[[str], Outcome], bench: Bench,
    strengths: Sequence[float], notes: Sequence[str], seed: int, on_trait: OnTrait | None,
) -> Effects:  # fmt: skip
    asked = np.array(bench.questions.texts)
    for trait in traits:
        if trait not in before.scores or np.isnan(before.scores[trait]).all():
            raise DataError(f"the judge never scores {trait} on these questions: choose others, or another judge")
    matrix, valid = [], []
    for trait in traits:
        found = after(trait)
        row = [gain(found.scores[other], before.scores[other], asked, seed=seed) for other in traits]
        has_valid = "valid" in found.scores
        valid.append(gain(found.scores["valid"], before.scores["valid"], asked, seed=seed) if has_valid else UNKNOWN)
        matrix.append(tuple(row))
        if on_trait:
            on_trait(how, trait, row)
    base = tuple(float(np.nanmean(before.scores[trait])) for trait in traits)
    return Effects(how, tuple(traits), tuple(strengths), base, tuple(matrix), tuple(valid), tuple(notes))


def _effects_text(one: Effects) -> str:
    table = [[one.how, "strength", *one.traits, "valid"]]
    table.append(["nothing", "", *(f"{rate:.2f}" for rate in one.base), ""])
    for i, trait in enumerate(one.traits):
        strength = "" if math.isnan(one.strengths[i]) else f"{one.strengths[i]:.3g}"
        cells = [f"{cell.value:+.2f}{'*' if cell.low > 0 or cell.high < 0 else ' '}" for cell in one.matrix[i]]
        table.append([trait, strength, *cells, f"{one.valid[i].value:+.2f}"])
    told = "rows: what is moved; columns: change of each trait's rate; *: its 95 % interval is off 0"
    return "\n".join([*aligned(table), told, *one.notes])


def foretold_text(found: Sequence[Foretold]) -> str:
    """As a table."""
    table = [[f"foretold by ({found[0].n} pairs)", "Spearman", "p Mantel", "out-of-sample R2"]]
    for one in found:
        p = "" if math.isnan(one.p) else f"{one.p:.3g}"
        table.append([one.by, shown(one.spearman, 2, "+"), p, shown(one.r2, 2, "+")])
    return "\n".join(aligned(table))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _effects(raw: Mapping[str, Any]) -> Effects:
    def cells(row: Sequence[Sequence[float | None]]) -> tuple[Interval, ...]:
        return tuple(Interval(*map(_number, cell)) for cell in row)

    return Effects(
        raw["how"], tuple(raw["traits"]), tuple(map(_number, raw["strengths"])), tuple(map(_number, raw["base"])),
        tuple(cells(row) for row in raw["matrix"]), cells(raw["valid"]), tuple(raw["notes"]),
    )  # fmt: skip
