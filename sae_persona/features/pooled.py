"""One row a labelled answer: what its latents and its residual stream were, and what is known about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import h5py
import numpy as np
from scipy import sparse

from sae_persona.features.files import reading_h5, write_h5
from sae_persona.types import SparseLatents

Pool = Literal["pre", "max", "mean"]
POOLS: tuple[Pool, ...] = ("pre", "max", "mean")
_TEXTS = ("ids", "template", "domain", "author", "split")


@dataclass
class Pooled:
    """Labelled answers (examples), pooled over their tokens.

    personas                          the labels' names, sorted
    labels    [examples, personas]    fp32, NaN where an example does not carry a label
    ids, template, domain, author, split   [examples] str
    dialogue  [examples]              int64, number of the dialogue in the source: answers of one dialogue share it
    n_answer_tokens  [examples]       int64
    pools     "pre": latents at the token before the answer; "max", "mean": over the answer's tokens.
              Each CSR [examples, n_latents] fp32
    dense     "pre", "mean": the residual stream likewise, [examples, d_in] fp32
    """

    personas: tuple[str, ...]
    labels: np.ndarray
    ids: np.ndarray
    template: np.ndarray
    domain: np.ndarray
    author: np.ndarray
    split: np.ndarray
    dialogue: np.ndarray
    n_answer_tokens: np.ndarray
    pools: dict[Pool, sparse.csr_matrix]
    dense: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_latents(self) -> int:
        return self.pools["pre"].shape[1]  # pyright: ignore

    def save(self, path: Path) -> None:
        """Write to one HDF5 file, whole or not at all."""
        write_h5(path, "examples", self._fill)

    def _fill(self, file: h5py.File) -> None:
        file["personas"] = np.array(self.personas, dtype=h5py.string_dtype())
        for name in _TEXTS:
            file[name] = getattr(self, name).astype(object).astype(h5py.string_dtype())
        for name in ("labels", "dialogue", "n_answer_tokens"):
            file[name] = getattr(self, name)
        for name, part in self.dense.items():
            file[f"dense/{name}"] = part
        for name, matrix in self.pools.items():
            group = file.create_group(f"pools/{name}")
            group.attrs["shape"] = matrix.shape
            group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote. FormatError if it is missing, cut short or of another format."""
        with reading_h5(path, "examples") as file:
            return cls(
                personas=tuple(file["personas"].asstr()[:].tolist()),
                pools={name: _matrix(file[f"pools/{name}"]) for name in POOLS},
                dense={name: file[f"dense/{name}"][:] for name in ("pre", "mean")},
                **{name: file[name].asstr()[:].astype(str) for name in _TEXTS},
                **{name: file[name][:] for name in ("labels", "dialogue", "n_answer_tokens")},
            )


def _matrix(group: Any) -> sparse.csr_matrix:
    return sparse.csr_matrix((group["data"][:], group["indices"][:], group["indptr"][:]), shape=group.attrs["shape"])


def to_csr(latents: SparseLatents, n_latents: int) -> sparse.csr_matrix:
    """The same n tokens as a CSR matrix [n, n_latents] fp32 without stored zeros."""
    acts, idx = latents.acts.detach().float().cpu().numpy().ravel(), latents.idx.cpu().numpy().ravel()
    if latents.offsets is None:
        offsets = np.arange(latents.n + 1) * latents.acts.shape[1]
    else:
        offsets = latents.offsets.cpu().numpy()
    matrix = sparse.csr_matrix((acts, idx, offsets), shape=(latents.n, n_latents), copy=True)
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return matrix


def pool(
    tokens: sparse.csr_matrix, pre: Sequence[int], spans: Sequence[tuple[int, int]]
) -> dict[Pool, sparse.csr_matrix]:
    """Pool latents over each answer.

    tokens  [n, n_latents]   latents on a batch's tokens, all >= 0
    pre     the row before each answer; spans  its rows, [start, stop), not empty
    """
    lengths = np.array([stop - start for start, stop in spans])
    share = sparse.csr_matrix(
        (
            np.repeat(1.0 / lengths, lengths),
            np.concatenate([np.arange(*span) for span in spans]),
            np.append(0, lengths.cumsum()),
        ),
        shape=(len(spans), tokens.shape[0]),  # pyright: ignore
    )
    strongest = sparse.vstack([tokens[start:stop].max(axis=0) for start, stop in spans])
    pools: dict[Pool, Any] = {"pre": tokens[list(pre)], "max": strongest, "mean": share @ tokens}
    return {name: sparse.csr_matrix(matrix, dtype=np.float32) for name, matrix in pools.items()}
