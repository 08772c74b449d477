"""The decoder directions nearest to a vector: exactly, and at the speed of memory.

131,072 directions of width 4,096 are 2 GB in fp32. So each unit row v is also kept as 8-bit codes with one scale, and
with it the length of what the codes leave out, |v - scale * codes|, rounded up. For a unit query q the cosine lies
within that length of the codes' cosine (Cauchy-Schwarz), so only rows whose upper bound reaches the k-th best lower
bound can be among the k best, and those alone are read in fp32. Nothing is approximate in the answer.

The codes' products are sums of integers (exact in int32, whatever the order); the query is split into two 8-bit
parts, of which the second is used only on rows that the first leaves in doubt. All but those products is done in
numpy, on one thread: torch's threads would meet after every short operation, which takes long on a busy machine.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_persona.errors import DataError, FormatError, ModelError
from sae_persona.runs import write_whole

FORMAT = 1
LEVELS = 127
AT_ONCE = 2**22
"""Entries that are worked on at once."""
FEW = 2048
"""So few rows are read in fp32 rather than narrowed down any further."""
_TINY = torch.finfo(torch.float32).tiny
_ROUNDING = 1e-9  # of a dozen fp64 operations on numbers near 1, with room to spare


@dataclass(frozen=True, eq=False)
class Directions:
    """Rows, and what finds the nearest of them.

    rows   [n, d]   any norms, fp32; may be mapped from a file. A row of zeros has cosine 0 with everything
    codes  [n, d]   int8
    scale  [n]      fp32, unit row = scale * codes + what they leave out
    error  [n]      fp32, no less than the length of what they leave out
    """

    rows: Tensor
    codes: Tensor
    scale: Tensor
    error: Tensor

    @property
    def n(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, rows: Tensor) -> Self:
        """Code the rows [n, d] of an fp32 matrix on the CPU. DataError if one is not finite."""
        codes = torch.empty(rows.shape, dtype=torch.int8)
        scale, error = torch.empty(len(rows)), torch.empty(len(rows))
        for here in _blocks(len(rows), rows.shape[1]):
            part = rows[here]
            part = part / part.abs().amax(1, keepdim=True).clamp(min=_TINY)  # whose squares fit into fp32
            unit = torch.nn.functional.normalize(part, dim=1, eps=_TINY)
            if not unit.isfinite().all():
                raise DataError("a decoder direction is not finite: train the SAE again")
            step = unit.abs().amax(1, keepdim=True) / LEVELS
            whole = (unit / step.clamp(min=_TINY)).round_().clamp_(-LEVELS, LEVELS)
            codes[here], scale[here] = whole.to(torch.int8), step[:, 0]
            # beside the length itself: fp32 rounding of the unit row and of the product, a few times 2**-24 of length
            # 1; and of the norm's sum, d times 2**-24 of itself
            error[here] = (unit - step * whole).norm(dim=1) * 1.001 + 1e-6
        return cls(rows, codes, scale, error)

    def save(self, path: Path, facts: dict[str, str]) -> None:
        """Write the codes, whole or not at all; the rows stay where they are. ``facts`` say what they were made of."""
        parts = {"codes": self.codes, "scale": self.scale, "error": self.error}
        about = {**facts, "kind": "directions", "format": str(FORMAT)}
        write_whole(path, lambda temporary: save_file(parts, temporary, metadata=about))

    @classmethod
    def open(cls, path: Path, rows: Tensor) -> Self:
        """Map what ``save`` wrote for these rows. FormatError if it is missing, of another kind or for other rows."""
        about = directions_facts(path)
        found = f"{about.get('kind')} format {about.get('format')}"
        if found != f"directions format {FORMAT}":
            raise FormatError(f"{path} holds {found}, wanted directions format {FORMAT}: delete it")
        with safe_open(path, "pt") as file:
            parts = {name: file.get_tensor(name) for name in ("codes", "scale", "error")}
        if parts["codes"].shape != rows.shape:
            raise FormatError(
                f"{path} is for directions {list(parts['codes'].shape)}, these are {list(rows.shape)}: delete it"
            )
        return cls(rows, **parts)

    def top(self, query: Tensor, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k rows of largest cosine with ``query`` [d], of equal ones the first: int64 [k] and fp64 [k], best first.

        allowed   [n] bool, or None: every row. If fewer than k are allowed, those

        ModelError for a query of another width, DataError for one that is not finite or has no direction.
        """
        q = self._query(query)
        left = np.arange(self.n) if allowed is None else np.flatnonzero(allowed)
        k = min(k, len(left))
        if not k:
            return left, np.empty(0)
        high, step = _coded(q)
        rest = q - step * high
        low, small = _coded(rest)
        products = step * _product(self.codes, high)[left]
        stay = self._hopeful(left, products, float(np.linalg.norm(rest)), k)
        left, products = left[stay], products[stay]
        if len(left) > FEW:
            products += small * _product(torch.from_numpy(self.codes.numpy()[left]), low)
            left = left[self._hopeful(left, products, float(np.linalg.norm(rest - small * low)), k)]
        cosines = self.cosines(query, left)
        best = np.argsort(-cosines, kind="stable")[:k]  # `left` ascends: of equal ones the first
        return left[best], cosines[best]

    def _hopeful(self, left: np.ndarray, products: np.ndarray, outside: float, k: int) -> np.ndarray:
        """Which of the rows ``left`` [m] can be among the k best, by their ``products`` with the query: bool [m].

        outside   length of the part of the query that the products do not have
        """
        error = self.error.numpy()[left].astype(np.float64)
        middle = self.scale.numpy()[left] * products
        radius = error + outside * (1 + error) + _ROUNDING  # |scale * codes| is at most 1 + error
        bar = np.partition(middle - radius, len(left) - k)[len(left) - k]
        return middle + radius >= bar

    def cosines(self, query: Tensor, latents: np.ndarray | None = None) -> np.ndarray:
        """Cosine of ``query`` [d] with the given rows [m], or with all: fp64, from fp32 rows. Errors as `top`."""
        q = self._query(query)
        rows = self.rows.numpy()
        m = self.n if latents is None else len(latents)
        found = np.empty(m)
        for here in _blocks(m, rows.shape[1]):
            part = rows[here if latents is None else latents[here]].astype(np.float64)
            norms = np.sqrt(np.einsum("nd,nd->n", part, part))
            found[here] = np.einsum("nd,d->n", part, q) / np.maximum(norms, np.finfo(np.float64).tiny)
        return found

    def _query(self, query: Tensor) -> np.ndarray:
        """The unit vector along it: [d] fp64."""
        if query.shape != self.rows.shape[1:]:
            raise ModelError(f"the directions have width {self.rows.shape[1]}, the vector is {list(query.shape)}")
        q = query.detach().double().cpu().numpy()
        if not np.isfinite(q).all() or not q.any():
            raise DataError("the vector is not finite, or zero everywhere: it has no direction")
        return q / np.linalg.norm(q)


def directions_facts(path: Path) -> dict[str, Any]:
    """What ``save`` was told, and the kind and format. FormatError if there is no such file."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise FormatError(f"no directions at {path}: {error}") from error


def _blocks(n: int, d: int) -> list[slice]:
    rows = max(1, AT_ONCE // d)
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _coded(x: np.ndarray) -> tuple[np.ndarray, float]:
    """Nearest whole multiples of a step, at most LEVELS in size: x [d] fp64 -> [d], and the step."""
    step = float(np.abs(x).max()) / LEVELS
    return np.rint(x / max(step, np.finfo(np.float64).tiny)), step


def _product(codes: Tensor, whole: np.ndarray) -> np.ndarray:
    """Exact products of int8 rows [m, d] and a vector of whole numbers [d] up to LEVELS: [m] fp64."""
    column = torch.from_numpy(whole.astype(np.int8))[:, None]
    return torch._int_mm(codes, column)[:, 0].numpy().astype(np.float64)  # pyright: ignore[reportPrivateImportUsage]
