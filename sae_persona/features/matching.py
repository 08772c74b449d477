"""Two dictionaries side by side: which latent of one is which of the other, by direction and by activation.

Decoder cosines are taken block by block, so no [n_a, n_b] matrix is ever held. Correlations are taken for candidate
pairs only: each latent's nearest directions, and those that fire with it on the first tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sae_persona.errors import ConfigError, ModelError
from sae_persona.features.files import reading_h5, write_h5
from sae_persona.features.pair_correlation import correlate
from sae_persona.sae.model import SAE


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """How two dictionaries are matched."""

    block: int = 4096
    """Directions of each side that are compared at once."""
    candidates: int = 16
    """Nearest directions of a latent that its correlation is taken with."""
    cofiring: int = 8
    """Latents that fire with it, strongest correlation first on the first tokens, that it is taken with as well."""
    first_tokens: int = 8192
    """Tokens on which those are looked for."""
    one_to_one: bool = False
    """Also the assignment of one to one with the largest sum of cosines: exact, for up to 4,096 latents."""

    def __post_init__(self) -> None:
        if min(self.block, self.candidates, self.first_tokens) < 1 or self.cofiring < 0:
            got = f"{self.block}, {self.candidates}, {self.first_tokens} and {self.cofiring}"
            raise ConfigError(f"block, candidates, first_tokens are at least 1 and cofiring at least 0, got {got}")


MOST_ASSIGNED = 4096


@dataclass(frozen=True)
class Matching:
    """The nearest latent in the other dictionary of every latent in each, arrays on the CPU.

    nearest_ab, nearest_ba   [n_a], [n_b] int64   largest cosine of decoder directions, of equal ones the first
    cosine_ab, cosine_ba     [n_a], [n_b] fp32
    correlation_ab           [n_a] fp32   Pearson's of a latent's activation and that of its nearest, zeros counted;
                             NaN where one of the two never fired, or always the same
    correlated_ab            [n_a] int64  the candidate whose activation correlates most, -1: none does
    correlated_r             [n_a] fp32   that correlation, NaN where there is none
    assigned_ab              [n_a] int64  the partner in the best assignment of one to one, -1: none
    n_tokens                 that the correlations are over

    What was not asked for is None.
    """

    nearest_ab: np.ndarray
    cosine_ab: np.ndarray
    nearest_ba: np.ndarray
    cosine_ba: np.ndarray
    correlation_ab: np.ndarray | None = None
    correlated_ab: np.ndarray | None = None
    correlated_r: np.ndarray | None = None
    assigned_ab: np.ndarray | None = None
    n_tokens: int = 0

    @property
    def mutual(self) -> np.ndarray:
        """Which latents of the first are their nearest's nearest: bool [n_a]."""
        return self.nearest_ba[self.nearest_ab] == np.arange(len(self.nearest_ab))

    def summary(self) -> dict[str, float | int | None]:
        """Shares of the first dictionary's latents and, where the name says so, of the second's."""
        found: dict[str, float | int | None] = {
            "latents_a": len(self.nearest_ab),
            "latents_b": len(self.nearest_ba),
            "mean_cosine_ab": float(self.cosine_ab.mean()),
            "mean_cosine_ba": float(self.cosine_ba.mean()),
        }
        for bar in (0.7, 0.9):
            found[f"above_{bar}_ab"] = float((self.cosine_ab > bar).mean())
            found[f"above_{bar}_ba"] = float((self.cosine_ba > bar).mean())
            found[f"mutual_above_{bar}"] = float((self.mutual & (self.cosine_ab > bar)).mean())
        found["mutual"] = float(self.mutual.mean())
        if self.correlation_ab is not None:
            known = self.correlation_ab[~np.isnan(self.correlation_ab)]
            found |= {"tokens": self.n_tokens, "correlation_known": len(known)}
            found["median_correlation"] = float(np.median(known)) if len(known) else None
        return found

    def pairs(self, n: int) -> list[dict[str, Any]]:
        """The ``n`` nearest pairs, nearest first, as JSON values."""
        rows = []
        for i in np.argsort(-self.cosine_ab, kind="stable")[:n].tolist():
            row = {"a": i, "b": int(self.nearest_ab[i]), "cosine": float(self.cosine_ab[i])}
            row["mutual"] = bool(self.mutual[i])
            if self.correlation_ab is not None:
                r = float(self.correlation_ab[i])
                row["correlation"] = None if np.isnan(r) else r
            rows.append(row)
        return rows

    def save(self, path: Path) -> None:
        """Write as HDF5, whole or not at all."""

        def fill(file: Any) -> None:
            file.attrs["n_tokens"] = self.n_tokens
            for one in fields(self):
                if isinstance(value := getattr(self, one.name), np.ndarray):
                    file[one.name] = value
            file["mutual"] = self.mutual

        write_h5(path, "matching", fill)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote. FormatError if it is missing, cut short or of another format."""
        with reading_h5(path, "matching") as file:
            names = [one.name for one in fields(cls) if one.name != "n_tokens"]
            needed = {"nearest_ab", "cosine_ab", "nearest_ba", "cosine_ba"}
            parts = dict[str, Any]((name, file[name][:]) for name in names if name in file or name in needed)
            parts["n_tokens"] = int(file.attrs["n_tokens"])
        return cls(**parts)


@torch.no_grad()
def match(a: SAE, b: SAE, *, acts: Iterable[Tensor] | None = None, config: MatchConfig | None = None) -> Matching:
    """Match the latents of two SAEs, on the device that they are on.

    acts   batches [n, d_in] of the activations that both read: adds correlations; read once

    ModelError if the SAEs write to spaces of different width or, with ``acts``, read different widths; ConfigError if
    an assignment of one to one is asked for of more than MOST_ASSIGNED latents.
    """
    config = config or MatchConfig()
    if a.d_out != b.d_out or (acts is not None and a.d_in != b.d_in):
        raise ModelError(
            f"the dictionaries are of widths {a.d_in} to {a.d_out} and {b.d_in} to {b.d_out}: "
            "compare SAEs of one hook point"
        )
    most = max(a.n_latents, b.n_latents)
    if config.one_to_one and most > MOST_ASSIGNED:
        raise ConfigError(f"one_to_one takes up to {MOST_ASSIGNED} latents, got {most}: leave it out")
    ours, theirs = (torch.nn.functional.normalize(sae.w_dec, dim=1) for sae in (a, b))
    k = min(config.candidates, b.n_latents) if acts is not None else 1
    (cosine_ab, near_ab), (cosine_ba, near_ba) = nearest(ours, theirs, k, config.block)
    found: dict[str, Any] = {}
    if acts is not None:
        pairs = correlate(a, b, acts, near_ab, cofiring=config.cofiring, first_tokens=config.first_tokens)
        found["correlation_ab"] = pairs.r[:, 0].cpu().numpy()
        r = pairs.r.nan_to_num(nan=-torch.inf)
        best = r.argmax(1, keepdim=True)
        none = r.gather(1, best).isinf().squeeze(1)
        found["correlated_ab"] = pairs.candidates.gather(1, best).squeeze(1).masked_fill(none, -1).cpu().numpy()
        found["correlated_r"] = r.gather(1, best).squeeze(1).masked_fill(none, torch.nan).cpu().numpy()
        found["n_tokens"] = pairs.n_tokens
    if config.one_to_one:
        found["assigned_ab"] = _assigned(ours, theirs)
    found |= {"nearest_ab": near_ab[:, 0].cpu().numpy(), "cosine_ab": cosine_ab[:, 0].cpu().numpy()}
    return Matching(nearest_ba=near_ba.cpu().numpy(), cosine_ba=cosine_ba.cpu().numpy(), **found)


def nearest(a: Tensor, b: Tensor, k: int, block: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The k rows of b that are nearest to each row of a, and the one of a nearest to each of b; rows of unit norm.

    a [n_a, d], b [n_b, d] -> (cosine, row of b) [n_a, k], best first; (cosine, row of a) [n_b]
    """
    best_ab = a.new_full((len(a), k), -torch.inf), torch.zeros(len(a), k, dtype=torch.int64, device=a.device)
    best_ba = b.new_full((len(b),), -torch.inf), torch.zeros(len(b), dtype=torch.int64, device=b.device)
    for i in range(0, len(a), block):
        rows = slice(i, i + block)
        for j in range(0, len(b), block):
            cosines = a[rows] @ b[j : j + block].T
            values, where = cosines.topk(min(k, cosines.shape[1]), dim=1)
            values, where = torch.cat([best_ab[0][rows], values], 1), torch.cat([best_ab[1][rows], where + j], 1)
            best, place = values.topk(k, dim=1)
            best_ab[0][rows], best_ab[1][rows] = best, where.gather(1, place)
            top, row = cosines.max(0)
            columns = slice(j, j + block)
            larger = top > best_ba[0][columns]
            best_ba[0][columns] = torch.where(larger, top, best_ba[0][columns])
            best_ba[1][columns] = torch.where(larger, row + i, best_ba[1][columns])
    return best_ab, best_ba


def _assigned(a: Tensor, b: Tensor) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment  # here: few need it

    rows, columns = linear_sum_assignment((a @ b.T).cpu().numpy(), maximize=True)
    found = np.full(len(a), -1, np.int64)
    found[rows] = columns
    return found
