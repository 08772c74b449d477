"""The examples of a split, which several personas may share, and the statistics that are taken over them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_persona.attribution.association import Interval
from sae_persona.attribution.labels import Selection, Split, Within, select
from sae_persona.attribution.midranks import SortedColumns
from sae_persona.attribution.null import Statistic, rank_statistics
from sae_persona.attribution.partial import Covariates, Residuals, partial_correlation, partial_statistics
from sae_persona.attribution.splines import is_numeric, room_for_knots, splines
from sae_persona.features.pooled import Pooled


@dataclass(frozen=True)
class Labelled:
    """A persona and its examples in both splits."""

    persona: str
    train: Selection
    held_out: Selection

    @classmethod
    def of(
        cls, pooled: Pooled, persona: str, within: Sequence[Within], *, min_confidence: float = 0.0, force: bool = False
    ) -> "Labelled":
        """Settings and DataError as in ``select``."""
        train, held_out = (
            select(pooled, persona, split, within=within, min_confidence=min_confidence, force=force)
            for split in ("train", "held_out")
        )
        return cls(persona, train, held_out)

    def split(self, name: Split) -> Selection:
        return self.train if name == "train" else self.held_out

    @property
    def examples(self) -> tuple[bytes, ...]:
        """Equal for personas that are labelled on the same examples in the same blocks."""
        return tuple(part.tobytes() for s in (self.train, self.held_out) for part in (s.rows, s.blocks))


def room_in_both(labelled: Labelled, known: Covariates) -> int:
    """Knots of a numeric covariate's spline that both splits have room for."""
    return min(
        room_for_knots(known.at(part.rows, name), part.n_blocks)
        for name, part in (("train", labelled.train), ("held_out", labelled.held_out))
    )


def controls(known: Covariates, train: Selection, n_knots: int) -> tuple[str, ...]:
    """How each covariate is taken away, such as "length (splines, 5 knots)"."""
    values = known.at(train.rows, "train")
    bends = f"splines, {n_knots} knot{'s' * (n_knots > 1)}" if n_knots else "a straight line: too few examples to bend"
    found = dict.fromkeys(known.wholes, "")
    for whole, numeric in zip(known.wholes, is_numeric(values), strict=True):
        if numeric:
            found[whole] = f" ({bends})"
    if idle := _idle(known, values, train.blocks):
        found |= dict.fromkeys(idle, " (constant in every block, so nothing is taken away)")
    return tuple(f"{whole}{how}" for whole, how in found.items())


def _idle(known: Covariates, values: np.ndarray, blocks: np.ndarray) -> set[str]:
    """Covariates that vary in no block."""
    first = np.unique(blocks, return_index=True)[1][blocks]
    varies = (values != values[first]).any(0)
    return set(known.wholes) - {whole for whole, here in zip(known.wholes, varies, strict=True) if here}


@dataclass(frozen=True)
class SplitExamples:
    """Latents over the examples of one split, for personas that are labelled on the same ones.

    columns        the latents, over these examples only
    y              [m, personas] bool
    blocks         [m] int64
    residuals      what takes blocks and covariates away; given: there are covariates
    by_activation  statistics are of activations, else of midranks
    """

    columns: SortedColumns
    personas: tuple[str, ...]
    y: np.ndarray
    blocks: np.ndarray
    residuals: Residuals
    given: bool
    by_activation: bool

    @classmethod
    def of(
        cls, split: Split, columns: SortedColumns, labelled: Sequence[Labelled], known: Covariates | None,
        n_knots: int, by_activation: bool,
    ) -> "SplitExamples":  # fmt: skip
        """Cut the columns of all examples down to a split. DataError as in ``Covariates.at`` and ``Residuals``.

        n_knots   of each numeric covariate's spline
        """
        selections = [one.split(split) for one in labelled]
        rows, blocks = selections[0].rows, selections[0].blocks
        values = np.zeros((len(rows), 0)) if known is None else splines(known.at(rows, split), n_knots)
        residuals = Residuals(values, blocks, columns.row.device)
        y = np.stack([selection.y for selection in selections], axis=1)
        personas = tuple(one.persona for one in labelled)
        return cls(columns.rows(rows), personas, y, blocks, residuals, known is not None, by_activation)

    def labels(self, of: int | None = None) -> Tensor:
        """Labels of one persona, or of all: [m, personas] bool, on the columns' device."""
        y = self.y if of is None else self.y[:, of : of + 1]
        return torch.from_numpy(y).to(self.columns.row.device)

    def statistics(self, columns: SortedColumns, of: int | None = None) -> list[Statistic]:
        """Of some of the latents, for one persona or all: rank sums, or partial correlations where they are asked for.

        DataError where covariates explain a label wholly.
        """
        if not self.given and not self.by_activation:
            return rank_statistics(columns, self.labels(of), self.blocks)
        personas = self.personas if of is None else self.personas[of : of + 1]
        return partial_statistics(columns, self._value(columns), self.labels(of), personas, self.residuals)

    def alone(self, columns: SortedColumns) -> list[Statistic]:
        """``statistics`` of all personas by the same formula, as if no covariate were given."""
        nothing = Residuals(np.zeros((len(self.y), 0)), self.blocks, columns.row.device)
        return partial_statistics(columns, self._value(columns), self.labels(), self.personas, nothing)

    def partial(self, columns: SortedColumns, of: int) -> Interval:
        """Partial correlations of some of the latents with one persona."""
        y, persona = self.y[:, of], self.personas[of]
        return partial_correlation(columns, self._value(columns), y, persona, self.residuals)

    def _value(self, columns: SortedColumns) -> Tensor:
        return columns.value if self.by_activation else columns.doubled
