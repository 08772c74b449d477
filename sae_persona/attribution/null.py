"""What the rank sums would be if labels did not matter: permutation within blocks.

    z_i = (R_i - E R_i) / sd R_i        R_i = rank sum of latent i over the examples with the label

Labels are permuted inside each block (a question template in a domain), so whatever a block brings to both label and
latent stays as it is and cannot look like an effect. Mean and variance of R_i over all such permutations are exact,
from each block's first two moments (van Elteren 1960). One permutation gives all latents at once, so the maximum over
latents (Westfall and Young 1993) sees how the latents depend on each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

_COLUMNS = 64
"""Permutations in one product: bounds the memory at n_latents x 64 and keeps the labels in the processor's cache."""
_TIE = 1e-9
"""Statistics this near count as equal: two orders of the same sum."""


@dataclass(frozen=True)
class Null:
    """Standardised rank sums and how often chance does as well: arrays [n_latents].

    z        positive where the latent rises with the label; 0 where no permutation changes its rank sum
    p        (1 + #{b: s_ib >= s_i}) / (B + 1), of this latent alone
    p_max_t  (1 + #{b: max_j s_jb >= s_i}) / (B + 1), adjusted for all the latents: family-wise error
    q_bh     Benjamini and Hochberg's false discovery rate, over p pooled across latents (see permutation_test)
    """

    z: np.ndarray
    p: np.ndarray
    p_max_t: np.ndarray
    q_bh: np.ndarray


def permutation_test(
    ranks: sparse.csr_matrix,
    y: np.ndarray,
    blocks: np.ndarray,
    *,
    permutations: int,
    seed: int,
    direction: np.ndarray | None = None,
) -> Null:
    """Test all latents by permuting labels within blocks.

    ranks      [n_latents, m]     centred midranks
    y, blocks  [m] bool, [m] int  blocks count from 0
    direction  [n_latents] of +1 and -1: one-sided, s = direction * z. None: two-sided, s = |z|

    q_bh pools the null over latents, as SAM and qvalue do: with B permutations a latent's own p cannot fall below
    1 / (B + 1), which no correction for thousands of latents survives. Pooling takes the standardised sums to have
    one null distribution; p and p_max_t do not need that.
    """
    from scipy.stats import false_discovery_control  # here: importing scipy.stats costs half a second

    mean, deviation = _moments(ranks, y, blocks)
    alive = deviation > 0
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=alive)

    def standardised(labels: np.ndarray) -> np.ndarray:
        return (ranks @ labels - mean[:, None]) * scale[:, None]

    def statistic(z: np.ndarray) -> np.ndarray:
        return np.abs(z, out=z) if direction is None else np.multiply(z, direction[:, None], out=z)

    z = standardised(y[:, None].astype(np.float64))
    bar = statistic(z.copy())[:, 0] - _TIE
    own, maxima, pooled = (np.zeros(len(bar), np.int64) for _ in range(3))
    for labels in permuted_labels(y, blocks, permutations, np.random.default_rng(seed)):
        null = statistic(standardised(labels))
        own += (null >= bar[:, None]).sum(1)
        maxima += _at_least(null.max(axis=0), bar)
        pooled += _at_least(null[alive].ravel(), bar)
    q = np.ones(len(bar))
    if alive.any():
        q[alive] = false_discovery_control((1 + pooled[alive]) / (1 + permutations * alive.sum()))
    return Null(z[:, 0], (1 + own) / (permutations + 1), (1 + maxima) / (permutations + 1), q)


def permuted_labels(y: np.ndarray, blocks: np.ndarray, n: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Draw ``n`` permutations of ``y`` within blocks: chunks [m, up to 64] fp64 of zeros and ones."""
    by_block = np.argsort(blocks, kind="stable")
    for start in range(0, n, _COLUMNS):
        # sorting block + uniform shuffles every block and keeps it in its place
        keys = blocks[by_block, None] + generator.random((len(y), min(_COLUMNS, n - start)))
        labels = np.empty(keys.shape)
        labels[by_block] = y[by_block][np.argsort(keys, axis=0)]
        yield labels


def _moments(ranks: sparse.csr_matrix, y: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean and standard deviation of each rank sum over all permutations within blocks: [n_latents] each."""
    m = len(y)
    member = sparse.csr_matrix((np.ones(m), (np.arange(m), blocks)))
    size, with_label = np.bincount(blocks), np.bincount(blocks, y)
    sums, squares = sparse.csr_matrix(ranks @ member), sparse.csr_matrix(ranks.power(2) @ member)
    weight = with_label * (size - with_label) / (size * np.maximum(size - 1, 1))
    total = squares @ weight
    variance = total - sums.power(2) @ (weight / size)
    # what rounding leaves of a latent that is constant in every block is not a variance
    return sums @ (with_label / size), np.sqrt(np.where(variance > 1e-12 * total, variance, 0))


def _at_least(values: np.ndarray, bars: np.ndarray) -> np.ndarray:
    """How many of ``values`` reach each bar."""
    return len(values) - np.searchsorted(np.sort(values), bars)
