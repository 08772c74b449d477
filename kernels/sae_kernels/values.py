"""What ops pass to each other, and the numbers they agree on. Never imports triton, so that the oracles can use it."""

from dataclasses import dataclass

from torch import Tensor

LR, M_FIX, V_FIX, FACTOR, AUX, COUNT, STEP, LOSS, FLAGGED = range(9)  # places in the scalars of a step: `scalars.py`
BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's
FP8_LARGEST = 448.0  # largest e4m3
FP8_HEADROOM = 1.125  # by how much a row's largest value may grow in a step
BLOCK = 128  # entries that `block_sums` adds up at once
BLOCK_N = 128  # tokens that `column_sums` adds up at once

CELL_SHIFT = 12  # `null_counts`: a cell is the leading bits of a statistic in fp32, 11 of them its mantissa's,
LOWEST_CELL = (127 - 5) << (23 - CELL_SHIFT)  # counted from 2^-5: what is smaller, or negative, is in the first cell
CELLS = 16 << (23 - CELL_SHIFT)  # and from 2^11 on all is in the last. So a cell is at most 1 / 2048 of its value wide


@dataclass(frozen=True)
class NullCounts:
    """Counts over statistics of permuted labels; shapes in `null_counts.py`."""

    at_least: Tensor
    maxima: Tensor
    histogram: Tensor


@dataclass(frozen=True)
class Entries:
    """What fires, as CSR; shapes in `compact.py` and `winners.py`."""

    acts: Tensor
    idx: Tensor
    offsets: Tensor
    near: Tensor | None = None
    active: Tensor | None = None


@dataclass(frozen=True)
class LatentOrder:
    """Entries in the order of their latents: latent [capacity], entry [capacity] int64, offsets [n_latents + 1]."""

    latent: Tensor
    entry: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class PackedLists:
    """Entries by latent; shapes in `packed_lists.py`."""

    latent: Tensor
    token: Tensor
    acts: Tensor
    d_acts: Tensor
    near: Tensor | None
    offsets: Tensor


@dataclass(frozen=True)
class Rows:
    """A weight matrix and what its update needs; shapes in `row_update.py`."""

    high: Tensor
    low: Tensor | None
    m: Tensor
    v: Tensor
    inverse_norm: Tensor | None = None
    fp8: Tensor | None = None
    fp8_scale: Tensor | None = None
    fp8_next: Tensor | None = None


@dataclass(frozen=True)
class Latents:
    """What there is one of a latent, all [n_latents] fp32 but ``silent``, int64: tokens since the latent fired."""

    b: Tensor
    b_m: Tensor
    b_v: Tensor
    silent: Tensor
    threshold: Tensor | None = None
    threshold_m: Tensor | None = None
    threshold_v: Tensor | None = None


@dataclass(frozen=True)
class AuxGrads:
    """Gradients of the dead rows [m, d]; the place of each latent among them, -1 for none: slot [n_latents] int32.

    along   [m] fp32   encoder: gradients of b_enc. decoder: the part of each gradient along its row
    """

    rows: Tensor
    slot: Tensor
    along: Tensor
