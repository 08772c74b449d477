"""Association given covariates: what of latent and label is left when both are regressed on what is known already.

    r_i = f_i . e / (|M f_i| |e|)       e = M y,  M = I - H,  H projects onto the blocks and the covariates

f_i is a latent's midranks or activations, y the label. Since M is symmetric and M e = e, the numerator is one
sparse-dense product of the raw entries, and no latent is ever residualised. The null is Freedman and Lane's (1983): the
residuals e are permuted within blocks, residualised again, and correlated with every latent. It is exact where the
covariates explain nothing, and approximate otherwise (Winkler et al. 2014, NeuroImage 92). Without covariates r_i is
the correlation within blocks, and the permutation test of it exact.

Products are summed in fp32: statistics nearer than 1e-4 standard errors count as equal, which errs against the latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sae_persona.attribution.association import Interval, fisher
from sae_persona.attribution.midranks import SortedColumns
from sae_persona.attribution.null import Statistic, squared_block_sums
from sae_persona.errors import ConfigError, DataError

_TIE = 1e-4
_NOTHING = 1e-10
"""Share of a sum of squares that is what rounding left of nothing."""


@dataclass(frozen=True)
class Covariates:
    """What is known of each example beside the persona.

    values  [examples, c]   any real numbers; NaN where one is not known
    names   one a column; "topic=food" is one of the columns of "topic"
    """

    names: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names):
            raise DataError(f"covariates are [examples, {len(self.names)}], one a name: got {self.values.shape}")

    def named(self, given: Sequence[str]) -> "Covariates":
        """The columns of the covariates ``given``. ConfigError for a name that there is not."""
        whole = [name.partition("=")[0] for name in self.names]
        known = dict.fromkeys([*whole, *self.names])
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(f"no covariate is named {', '.join(unknown)}: there are {', '.join(known) or 'none'}")
        here = [i for i, name in enumerate(self.names) if name in given or whole[i] in given]
        return Covariates(tuple(self.names[i] for i in here), self.values[:, here])

    def at(self, rows: np.ndarray, where: str) -> np.ndarray:
        """Values of some examples, [rows, c] fp64. DataError if one is not a finite number; ``where`` they are."""
        values = self.values[rows].astype(np.float64)
        missing = (~np.isfinite(values)).sum(0)
        if missing.any():
            i = int(missing.argmax())
            raise DataError(
                f"covariate {self.names[i]!r} is not a number at {missing[i]} of {len(rows)} {where} examples: "
                f"fill it in, or leave it out of what is given"
            )
        return values


class Residuals:
    """Projection away from blocks and covariates: constant and collinear covariates take nothing further away.

    values  [m, c] fp64, blocks [m] from 0. DataError if covariates leave not even three examples to tell by.
    """

    def __init__(self, values: np.ndarray, blocks: np.ndarray, device: torch.device | str = "cpu") -> None:
        self.block = torch.from_numpy(blocks).to(device)
        self.size = torch.bincount(self.block).double()
        raw = torch.from_numpy(values).to(device)
        centred = self._within_blocks(raw)
        norm = centred.norm(dim=0)
        # what is constant in every block leaves only rounding behind
        centred = centred[:, norm > 1e-8 * raw.norm(dim=0)]
        u, s, _ = torch.linalg.svd(centred / centred.norm(dim=0), full_matrices=False)
        self.basis = u[:, s > 1e-8 * s.max()] if len(s) else centred
        self.freedom = len(blocks) - len(self.size) - self.basis.shape[1]
        if values.shape[1] and self.freedom < 3:
            raise DataError(
                f"{self.basis.shape[1]} covariates and {len(self.size)} blocks leave {self.freedom} of {len(blocks)} "
                f"examples to tell by, at least 3 are needed: give fewer covariates or use coarser blocks"
            )

    def of(self, x: Tensor) -> Tensor:
        """What is left of the columns of x [m, b], fp64."""
        return self.beyond(self._within_blocks(x.double()))

    def beyond(self, x: Tensor) -> Tensor:
        """The same of columns whose sum in every block is 0 already."""
        return x - self.basis @ (self.basis.T @ x)

    def norms(self, columns: SortedColumns, entries: Tensor) -> Tensor:
        """Norm of what is left of each latent whose entries are ``entries`` [nnz] fp64: [n_latents]; 0 for nothing."""
        total = columns.sums(entries.square())
        squares = total - squared_block_sums(columns, entries, self.block, 1 / self.size[:, None])[:, 0]
        squares -= columns.products(entries, self.basis).square().sum(1)
        return torch.where(squares > _NOTHING * total, squares, 0).sqrt()

    def _within_blocks(self, x: Tensor) -> Tensor:
        sums = torch.zeros(len(self.size), x.shape[1], dtype=torch.float64, device=x.device)
        return x - (sums.index_add_(0, self.block, x) / self.size[:, None])[self.block]


def partial_statistics(
    columns: SortedColumns, value: Tensor, labels: Tensor, personas: Sequence[str], residuals: Residuals
) -> list[Statistic]:
    """Partial correlations, times the root of the freedom left, of every label: for ``permutation_null``.

    value     [nnz]    of the entries: doubled midranks, or activations
    labels    [m, c]   of zeros and ones; personas are their names
    """
    left, r, norms = _partial(columns, value, labels, personas, residuals)
    root = residuals.freedom**0.5
    scale = torch.where(norms > 0, root / norms, 0)
    nothing = torch.zeros_like(scale)

    return [
        Statistic(
            r[:, i] * root, scale, nothing, value.float(), partial(_residuals_of, left[:, i].clone(), residuals), _TIE
        )
        for i in range(labels.shape[1])
    ]


def _residuals_of(e: Tensor, residuals: Residuals, source: Tensor) -> Tensor:
    permuted = residuals.beyond(e[source].T)
    return (permuted / permuted.norm(dim=0)).float()


def partial_correlation(
    columns: SortedColumns, value: Tensor, y: np.ndarray, persona: str, residuals: Residuals
) -> Interval:
    """Partial correlation of every latent with y [m] bool, arrays [n_latents]; Fisher's interval. 0 for no variation.

    Midranks give the partial rank-biserial, activations the partial point-biserial correlation.
    """
    labels = torch.from_numpy(y).to(columns.row.device)[:, None]
    _, r, _ = _partial(columns, value, labels, (persona,), residuals)
    return fisher(r[:, 0].cpu().numpy(), residuals.freedom - 2)


def _partial(
    columns: SortedColumns, value: Tensor, labels: Tensor, personas: Sequence[str], residuals: Residuals
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual labels of norm 1 [m, c], partial correlations [n_latents, c], norms of the latents [n_latents]."""
    left = residuals.of(labels)
    norm = left.norm(dim=0)
    for i, persona in enumerate(personas):
        if norm[i] ** 2 <= _NOTHING * len(left):
            raise DataError(
                f"blocks and covariates explain {persona!r} wholly, so nothing is left to rank by: give fewer of them"
            )
    left, entries = left / norm, value.double()
    norms = residuals.norms(columns, entries)
    sums = columns.products(entries, left)
    return left, torch.where(norms[:, None] > 0, sums / norms[:, None], 0).clamp(-1, 1), norms
