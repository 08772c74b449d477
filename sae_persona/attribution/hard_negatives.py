"""How well latents, or any scores, tell a persona from what only looks like it."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from sae_persona.attribution.association import Interval, associate
from sae_persona.attribution.labels import Selection
from sae_persona.attribution.midranks import SortedColumns
from sae_persona.errors import DataError
from sae_persona.features.pooled import Pooled

FEWEST_HARD = 2


@dataclass(frozen=True)
class HardNegatives:
    """AUROCs of the same positives against two kinds of negatives, arrays [c] in each interval.

    hard    against the hard negatives: near .5 where a latent knows the persona's look only, below it where the hard
            negatives fire it more than the persona does
    other   against all other negatives
    """

    n_positive: int
    n_hard: int
    n_other: int
    hard: Interval
    other: Interval


def hard_negatives(values: sparse.csr_matrix | np.ndarray, pooled: Pooled, chosen: Selection) -> HardNegatives:
    """Measure columns of ``values`` [examples, c], latents or scores, on the examples that ``chosen`` picks.

    A hard negative is one that its row calls ``hard`` and that does not show the persona. DataError if there are fewer
    than two of either kind of negative.
    """
    hard = pooled.hard[chosen.rows] & ~chosen.y
    other = ~hard & ~chosen.y
    n_hard, n_other = int(hard.sum()), int(other.sum())
    if min(n_hard, n_other) < FEWEST_HARD:
        raise DataError(
            f"{n_hard} hard negatives and {n_other} others are here, at least {FEWEST_HARD} of each are needed: "
            f'mark rows that look like the persona and are not with "hard": true'
        )

    def against(negatives: np.ndarray) -> Interval:
        here = chosen.y | negatives
        return associate(SortedColumns.of(values[chosen.rows[here]]), chosen.y[here]).auroc

    return HardNegatives(int(chosen.y.sum()), n_hard, n_other, against(hard), against(other))
