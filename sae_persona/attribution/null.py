"""What the statistics would be if labels did not matter: permutation within blocks.

    z_i = (R_i - E R_i) / sd R_i        R_i = rank sum of latent i over the examples with the label

Labels are permuted inside each block (a question template in a domain), so whatever a block brings to both label and
latent stays as it is and cannot look like an effect. Mean and variance of R_i over all such permutations are exact,
from each block's first two moments (van Elteren 1960). One permutation gives all latents at once, so the maximum over
latents (Westfall and Young 1993) sees how the latents depend on each other.

Permutations are streamed in blocks of labels, each of which is one fused product (`sae_kernels.null_counts`): no matrix
of latents by permutations is ever in memory. Labels of several personas over the same examples go through the same
permutations. The other statistic, given covariates, is in `partial.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sae_kernels.ops import cells, null_counts
from torch import Tensor

from sae_persona.attribution.midranks import SortedColumns

_AT_ONCE = 1024
"""Permutations in one product: bounds the memory at that many times the examples."""
_WIDTH = 64
"""Rows of labels are filled up to a multiple of this, so that a GPU reads them in whole pieces."""
_BUFFER = 2**24
"""Sums of latents by blocks that are held at once."""
_TIE = 1e-9
"""Statistics this near count as equal: two orders of the same sum."""


@dataclass(frozen=True)
class Null:
    """Standardised statistics and how often chance does as well: arrays [n_latents].

    z        positive where the latent rises with the label; 0 where no permutation changes it
    p        (1 + #{b: s_ib >= s_i}) / (B + 1), of this latent alone
    p_max_t  (1 + #{b: max_j s_jb >= s_i}) / (B + 1), adjusted for all the latents: family-wise error
    q_bh     Benjamini and Hochberg's false discovery rate, over p pooled across latents

    q_bh pools the null over latents, as SAM and qvalue do: with B permutations a latent's own p cannot fall below
    1 / (B + 1), which no correction for thousands of latents survives. Pooling takes the statistics to have one null
    distribution; p and p_max_t do not need that. The pooled counts are of cells, at most 1/2048 of a statistic wide,
    and count the whole cell in which the latent lies, so they err against it.
    """

    z: np.ndarray
    p: np.ndarray
    p_max_t: np.ndarray
    q_bh: np.ndarray


@dataclass(frozen=True)
class Statistic:
    """A sum over entries and labels, standardised: what is seen, and what makes its labels under a permutation.

    z, scale, shift  [n_latents] fp64    z = sum * scale - shift; all 0 where no permutation changes the sum
    value            [nnz]               of the entries: int32 with labels of 0 and 1, fp32 with any labels
    labels           [b, m] -> [m, b]    from the example whose label each example gets to the labels, int8 or fp32
    tie              statistics this near count as equal
    """

    z: Tensor
    scale: Tensor
    shift: Tensor
    value: Tensor
    labels: Callable[[Tensor], Tensor]
    tie: float


def rank_statistics(columns: SortedColumns, labels: Tensor, blocks: np.ndarray) -> list[Statistic]:
    """Standardised rank sums of every label: labels [m, c] of zeros and ones, blocks [m] from 0."""
    block = torch.from_numpy(blocks).to(labels.device)
    size = torch.bincount(block)[:, None].double()
    ones = torch.zeros(len(size), labels.shape[1], dtype=torch.float64, device=labels.device)
    ones.index_add_(0, block, labels.double())
    weight = ones * (size - ones) / (size * (size - 1).clamp(min=1))
    ranks = columns.doubled.double()
    mean = columns.products(ranks, (ones / size)[block])
    total = columns.products(ranks.square(), weight[block])
    variance = total - squared_block_sums(columns, ranks, block, weight / size)
    # what rounding leaves of a latent that is constant in every block is not a variance
    alive = variance > 1e-12 * total
    scale = torch.where(alive, variance, torch.inf).rsqrt()
    shift = mean * scale
    z = columns.products(ranks, labels) * scale - shift
    few = labels.to(torch.int8)
    return [
        Statistic(z[:, i], scale[:, i], shift[:, i], columns.doubled, partial(_labels_of, few[:, i].clone()), _TIE)
        for i in range(labels.shape[1])
    ]


def _labels_of(y: Tensor, source: Tensor) -> Tensor:
    return y[source].T


def squared_block_sums(columns: SortedColumns, entries: Tensor, block: Tensor, weight: Tensor) -> Tensor:
    """Sum over blocks of weight times the square of each latent's sum in the block.

    entries [nnz] fp64, block [m] int64, weight [n_blocks, c] fp64 -> [n_latents, c] fp64
    """
    n_blocks, found = len(weight), []
    at_once = max(1, _BUFFER // n_blocks)
    for first in range(0, columns.n_latents, at_once):
        last = min(first + at_once, columns.n_latents)
        here = slice(int(columns.offsets[first]), int(columns.offsets[last]))
        sums = torch.zeros((last - first) * n_blocks, dtype=torch.float64, device=entries.device)
        sums.index_add_(0, (columns.latent[here] - first) * n_blocks + block[columns.row[here]], entries[here])
        found.append(sums.view(-1, n_blocks).square() @ weight)
    return torch.cat(found)


def permutation_null(
    columns: SortedColumns,
    statistics: Sequence[Statistic],
    blocks: np.ndarray,
    *,
    permutations: int,
    seed: int,
    direction: np.ndarray | None = None,
) -> list[Null]:
    """Test all latents by each statistic, under the same permutations within blocks.

    direction  [n_latents] of +1 and -1: one-sided, s = direction * z. None: two-sided, s = |z|
    """
    device, n_latents = columns.row.device, columns.n_latents
    sign = torch.ones(n_latents, device=device) if direction is None else torch.from_numpy(direction).to(device)
    scales, shifts = [s.scale * sign for s in statistics], [s.shift * sign for s in statistics]
    bars = [(s.z.abs() if direction is None else s.z * sign) - s.tie for s in statistics]
    wide = not statistics[0].value.is_floating_point() and bool((columns.sums(columns.doubled.abs()) >= 2**31).any())
    own = [torch.zeros(n_latents, dtype=torch.int64, device=device) for _ in statistics]
    maxima: list[list[Tensor]] = [[] for _ in statistics]
    histograms: list[Tensor | int] = [0 for _ in statistics]
    for source in permuted(blocks, permutations, seed=seed, device=device):
        for i, statistic in enumerate(statistics):
            found = null_counts(
                statistic.value, columns.row, columns.offsets, _filled(statistic.labels(source)), scales[i], shifts[i],
                bars[i], n=len(source), two_sided=direction is None, wide=wide,
            )  # fmt: skip
            own[i] += found.at_least
            maxima[i].append(found.maxima)
            histograms[i] = histograms[i] + found.histogram
    return [
        _null(s, bars[i], own[i], torch.cat(maxima[i]), histograms[i], permutations) for i, s in enumerate(statistics)
    ]


def permutation_test(
    columns: SortedColumns,
    y: np.ndarray,
    blocks: np.ndarray,
    *,
    permutations: int,
    seed: int,
    direction: np.ndarray | None = None,
) -> Null:
    """Test all latents by their rank sums for one label: y [m] bool, blocks [m] int from 0."""
    labels = torch.from_numpy(y).to(columns.row.device)[:, None]
    statistics = rank_statistics(columns, labels, blocks)
    return permutation_null(columns, statistics, blocks, permutations=permutations, seed=seed, direction=direction)[0]


def permuted(blocks: np.ndarray, n: int, *, seed: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Draw ``n`` permutations within blocks: chunks [up to 1024, m] int64, the example whose label each gets.

    Sorting block, random bits and number, packed in 63 bits, shuffles every block and keeps it in its place; that two
    of m examples get the same bits has a chance of m^3 / 2^64. The same on every device.
    """
    m, generator = len(blocks), np.random.default_rng(seed)
    by_block = np.argsort(blocks, kind="stable")
    number_bits, block_bits = max(1, (m - 1).bit_length()), int(blocks.max(initial=0)).bit_length()
    random_bits = 63 - number_bits - block_bits
    fixed = (blocks[by_block].astype(np.int64) << (63 - block_bits)) + by_block
    place = torch.from_numpy(by_block).to(device)
    for start in range(0, n, _AT_ONCE):
        keys = generator.integers(1 << random_bits, size=(min(_AT_ONCE, n - start), m))
        keys = (keys << number_bits) + fixed
        if torch.device(device).type == "cpu":
            keys.sort(axis=1)  # numpy's sort of whole numbers is several times torch's
            ordered = torch.from_numpy(keys)
        else:
            ordered = torch.from_numpy(keys).to(device).sort(dim=1).values
        source = torch.empty_like(ordered)
        source[:, place] = ordered & ((1 << number_bits) - 1)
        yield source


def _filled(labels: Tensor) -> Tensor:
    """The same labels [m, b] in rows of a multiple of ``_WIDTH``, the rest zeros."""
    out = labels.new_zeros(len(labels), -(-labels.shape[1] // _WIDTH) * _WIDTH)
    out[:, : labels.shape[1]] = labels
    return out


def _null(
    statistic: Statistic, bar: Tensor, own: Tensor, maxima: Tensor, histogram: Tensor | int, permutations: int
) -> Null:
    from scipy.stats import false_discovery_control  # here: importing scipy.stats costs half a second

    above = permutations - torch.searchsorted(maxima.sort().values, bar)
    reached = torch.as_tensor(histogram).flip(0).cumsum(0).flip(0)[cells(bar)]
    alive = (statistic.scale > 0).cpu().numpy()
    q = np.ones(len(alive))
    if alive.any():
        pooled = (1 + reached.cpu().numpy()[alive]) / (1 + permutations * alive.sum())
        q[alive] = false_discovery_control(pooled)
    p, p_max_t = ((1 + count.cpu().numpy()) / (permutations + 1) for count in (own, above))
    return Null(statistic.z.cpu().numpy(), p, p_max_t, q)
