"""One row a labelled answer: what its latents and its residual stream were, and what is known about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import h5py
import numpy as np
from scipy import sparse

from sae_persona.errors import DataError
from sae_persona.features.files import reading_h5, write_h5
from sae_persona.sae.model import SAE
from sae_persona.types import SparseLatents

Pool = Literal["pre", "max", "mean"]
POOLS: tuple[Pool, ...] = ("pre", "max", "mean")
_TEXTS = ("ids", "template", "domain", "author", "split", "texts")
_NAMES = ("personas", "covariate_names")
_ARRAYS = ("labels", "dialogue", "n_answer_tokens", "weights", "position", "answer", "hard", "covariates")


@dataclass
class Pooled:
    """Labelled answers (examples), pooled over their tokens.

    personas                          the labels' names, sorted
    labels    [examples, personas]    fp32, NaN where an example does not carry a label
    ids, template, domain, author, split   [examples] str
    dialogue  [examples]              int64, number of the dialogue in the source: answers of one dialogue share it
    n_answer_tokens  [examples]       int64
    weights   [examples, personas]    fp32, confidence in each label from 0 to 1; 1 where none is said
    texts     [examples] object       what the answer or span says, str; "" if it is awaited
    position  [examples]              int64, number of the token before the answer in its text, from 0
    answer    [examples]              int64, number of the answer in its dialogue, from 0; a span has its answer's
    hard      [examples]              bool, hard negatives: they look like the persona, and are not
    covariates  [examples, c]         fp64, what the rows bring, by covariate_names; NaN where one does not say
    sae       fingerprint of the SAE that the latents are of; "" if they are of none
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
    weights: np.ndarray = None  # pyright: ignore[reportAssignmentType]  # each of these as if no row said anything
    texts: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    position: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    answer: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    hard: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    covariates: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    covariate_names: tuple[str, ...] = ()
    sae: str = ""

    def __post_init__(self) -> None:
        n = len(self.labels)
        unsaid = {
            "weights": np.ones(self.labels.shape, np.float32),
            "texts": np.full(n, "", object),
            "position": np.zeros(n, np.int64),
            "answer": np.zeros(n, np.int64),
            "hard": np.zeros(n, bool),
            "covariates": np.empty((n, 0)),
        }
        for name, values in unsaid.items():
            if getattr(self, name) is None:
                setattr(self, name, values)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_latents(self) -> int:
        return self.pools["pre"].shape[1]  # pyright: ignore

    def check_sae(self, sae: SAE) -> None:
        """DataError if the latents are of another SAE."""
        check_fingerprint(self.sae, sae)

    def save(self, path: Path) -> None:
        """Write to one HDF5 file, whole or not at all."""
        write_h5(path, "examples", self._fill)

    def _fill(self, file: h5py.File) -> None:
        file.attrs["sae"] = self.sae
        for name in (*_NAMES, *_TEXTS):
            # HDF5's strings end at a NUL, which a text may hold
            cells = [cell.replace("\0", "\N{SYMBOL FOR NULL}") for cell in getattr(self, name)]
            file[name] = np.array(cells, dtype=h5py.string_dtype())
        for name in _ARRAYS:
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
                **{name: tuple(file[name].asstr()[:].tolist()) for name in _NAMES},
                texts=file["texts"].asstr()[:],
                sae=file.attrs["sae"],
                pools={name: _matrix(file[f"pools/{name}"]) for name in POOLS},
                dense={name: file[f"dense/{name}"][:] for name in ("pre", "mean")},
                **{name: file[name].asstr()[:].astype(str) for name in _TEXTS if name != "texts"},
                **{name: file[name][:] for name in _ARRAYS},
            )


def check_fingerprint(measured: str, sae: SAE) -> None:
    """DataError unless what has been measured was measured with this SAE. "" is of none, and agrees with any."""
    if measured and measured != sae.fingerprint:
        raise DataError(
            f"these statistics are of another SAE ({measured[:12]}) than this one ({sae.fingerprint[:12]}): "
            f"measure again with this SAE, or put the other back"
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
