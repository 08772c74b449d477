"""Association given covariates: what of latent and label is left when both are regressed on what is known already.

    r_i = f_i . e / (|M f_i| |e|)       e = M y,  M = I - H,  H projects onto the blocks and the covariates
    e_b = M S P_b e / S                 S_j^2 = h_j (1 - h_j),  h = H y, at least 0.02 from 0 and 1

f_i is a latent's midranks or activations, y the label. Since M is symmetric and M e = e, the numerator is one
sparse-dense product of the raw entries, and no latent is ever residualised. The null is Freedman and Lane's (1983): the
residuals e are permuted within blocks, residualised again, and correlated with every latent. Where covariates all but
say the label it hardly varies, and a residual from elsewhere would be too large there: so residuals are permuted in
units of the spread that a label of probability h has. Without covariates r_i is the correlation within blocks, and the
permutation test of it exact; given some it is approximate (Winkler et al. 2014, NeuroImage 92).

Covariates come as columns, and it is their sum that is taken away: bends must be among them (`splines.py`). What is
left of a covariate is what no such sum tells: products of two, jumps, and all that it measures badly. Where latents
bend with a covariate that all but says the label, 4 to 11 % of rankings given it by splines call one of 300 latents
significant at 5 %, the most over 80 examples; given it as a line nearly all do (`experiments/2026-11-ranking-null`).

Products are summed in fp32: statistics nearer than 1e-4 standard errors count as equal, which errs against the latent.
"""

from collections.abc import Callable, Sequence
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
_SURE = 0.02
"""A label's probability is taken to lie at least this far from 0 and 1."""
_NOTHING = 1e-10
"""Share of a sum of squares that is what rounding left of nothing."""


@dataclass(frozen=True)
class Covariates:
    """What is known of each example beside the persona.

    values     [examples, c]   any real numbers; NaN where one is not known
    names      one a column; "topic=food" is one of the columns of "topic"
    a_persona  those with a column for each persona, such as "class_words": a ranking is given its own persona's alone
    """

    names: tuple[str, ...]
    values: np.ndarray
    a_persona: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names):
            raise DataError(f"covariates are [examples, {len(self.names)}], one a name: got {self.values.shape}")

    @property
    def wholes(self) -> tuple[str, ...]:
        """Of each column, what it is one of: "topic" for "topic=food"."""
        return tuple(name.partition("=")[0] for name in self.names)

    def named(self, given: Sequence[str], persona: str = "") -> "Covariates":
        """The columns of the covariates ``given``, as a persona's ranking has them. ConfigError for one not here."""
        own = [
            name in given or (whole in given and (whole not in self.a_persona or name == f"{whole}={persona}"))
            for name, whole in zip(self.names, self.wholes, strict=True)
        ]
        found = {part for i, here in enumerate(own) if here for part in (self.names[i], self.wholes[i])}
        if unknown := [name for name in given if name not in found]:
            known = dict.fromkeys([*self.wholes, *self.names])
            of = f" of {persona}" if unknown[0] in self.a_persona else ""
            raise ConfigError(f"no covariate is named {', '.join(unknown)}{of}: there are {', '.join(known) or 'none'}")
        names = tuple(name for name, here in zip(self.names, own, strict=True) if here)
        return Covariates(names, self.values[:, own], self.a_persona)

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

    spread = _spread(labels.double() - residuals.of(labels))

    def permuted(i: int) -> Callable[[Tensor], Tensor]:
        if not residuals.basis.shape[1]:
            return partial(_residuals_of, left[:, i].clone(), residuals)
        return partial(_scaled_residuals_of, left[:, i] / spread[:, i], spread[:, i].clone(), residuals)

    return [Statistic(r[:, i] * root, scale, nothing, value.float(), permuted(i), _TIE) for i in range(labels.shape[1])]


def _spread(h: Tensor) -> Tensor:
    """Standard deviations of labels of probabilities h."""
    sure = h.clamp(_SURE, 1 - _SURE)
    return (sure * (1 - sure)).sqrt()


def _residuals_of(e: Tensor, residuals: Residuals, source: Tensor) -> Tensor:
    permuted = residuals.beyond(e[source].T)
    return (permuted / permuted.norm(dim=0)).float()


def _scaled_residuals_of(units: Tensor, spread: Tensor, residuals: Residuals, source: Tensor) -> Tensor:
    permuted = residuals.of(units[source].T * spread[:, None])
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
