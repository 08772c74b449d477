"""Null counts: how a statistic of every latent under permuted labels compares with the one seen.

    sum[i, b]    = sum over the entries e of latent i of value[e] * labels[row[e], b]
    s[i, b]      = sum[i, b] * scale[i] - shift[i] in fp64; its size, if two_sided
    at_least[i]  = #{b: s[i, b] >= bar[i]}
    maxima[b]    = max_i s[i, b]
    histogram[c] = #{(i, b): cell(s[i, b]) = c, scale[i] != 0}         cell: see `values.CELLS`

    value               [nnz]           int32 | fp32
    row                 [nnz]           int64          0 <= row < m: not checked
    offsets             [n_latents + 1] int64          latent i owns entries offsets[i] to offsets[i + 1]
    labels              [m, width]      int8 with int32 values | fp32 with fp32 values; width is a multiple of 16
    scale, shift, bar   [n_latents]     fp64
    n                   int             columns that count, the first ones; the others only fill the width
    wide                bool            sums may pass 2^31: add up int64 (int32 values only)

    at_least  [n_latents] int64     maxima  [n] fp64     histogram  [CELLS] int64

Integer sums are exact; fp32 sums are rounded as any fp32 sum. No matrix [n_latents, n] is ever in memory. Every result
is a count or a maximum, so every run gives the same bits. Oracle: `reference.null_counts`.

Why a gather, and not tensor cores: with nnz entries and N columns in all, the gather reads nnz * N bytes of labels from
L2 (a block of [10000, 1024] labels is 10 MB and stays there) and adds nnz * N times. For 131072 latents, 10000 examples
of 2000 entries and 32 x 1000 columns these are 6.4e11 bytes, 0.12 s at 5.5 TB/s, and 6.4e11 multiply-adds of 32 bits,
0.05 s at 64 a clock and SM. Densified ranks need two int8 digits: 2 * 131072 * 10000 * 32000 products, 0.08 s at the
card's int8 peak and twice that at what products reach, whatever nnz is. The two are level at this density (1.5 %); at
the 0.05 % of an SAE's activations on single tokens the gather does 1 / 30 of the work, and needs no buffers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.values import CELL_SHIFT, CELLS, LOWEST_CELL, NullCounts

GROUP = 64  # latents of one program
COLUMNS = 1024  # of one program
COPIES = 64  # of the histogram: programs that run at once seldom meet in one


@triton.jit
def _null_counts_kernel(
    value_ptr, row_ptr, offsets_ptr, labels_ptr, scale_ptr, shift_ptr, bar_ptr, at_least_ptr, maxima_ptr,
    histogram_ptr, n_latents, width, n, copies,
    TWO_SIDED: tl.constexpr, WIDE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr, LOWEST: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    # grid (groups, blocks of columns): a program's latents are `groups` apart, since dense ones often stand together.
    # It writes at_least[column block, its latents] and maxima[group, its columns], and adds to one histogram
    group, groups, block = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    there, counts = column < width, column < n
    histogram_ptr += ((block * groups + group) % copies) * CELLS
    best = tl.full((COLUMNS,), float("-inf"), tl.float64)
    for i in range(group, n_latents, groups):
        stop = tl.load(offsets_ptr + i + 1)
        if value_ptr.dtype.element_ty == tl.float32:
            total = tl.zeros((ENTRIES, COLUMNS), tl.float32)
        elif WIDE:
            total = tl.zeros((ENTRIES, COLUMNS), tl.int64)
        else:
            total = tl.zeros((ENTRIES, COLUMNS), tl.int32)
        for first in range(tl.load(offsets_ptr + i), stop, ENTRIES):
            e = first + tl.arange(0, ENTRIES)
            value = tl.load(value_ptr + e, mask=e < stop, other=0)
            row = tl.load(row_ptr + e, mask=e < stop, other=0)
            label = tl.load(labels_ptr + row[:, None] * width + column[None, :], mask=there[None, :], other=0)
            total += label.to(total.dtype) * value.to(total.dtype)[:, None]
        scale = tl.load(scale_ptr + i)
        s = tl.sum(total, 0).to(tl.float64) * scale - tl.load(shift_ptr + i)
        if TWO_SIDED:
            s = tl.abs(s)
        reaches = (s >= tl.load(bar_ptr + i)) & counts
        tl.store(at_least_ptr + block.to(tl.int64) * n_latents + i, tl.sum(reaches.to(tl.int32)))
        best = tl.maximum(best, s)
        if scale != 0:
            cell = (s.to(tl.float32).to(tl.int32, bitcast=True) >> SHIFT) - LOWEST
            cell = tl.minimum(tl.maximum(cell, 0), CELLS - 1)
            tl.atomic_add(histogram_ptr + cell, 1, mask=counts, sem="relaxed")
    tl.store(maxima_ptr + group.to(tl.int64) * n + column, best, mask=counts)


def null_counts(
    value: Tensor, row: Tensor, offsets: Tensor, labels: Tensor, scale: Tensor, shift: Tensor, bar: Tensor, *,
    n: int, two_sided: bool, wide: bool = False,
) -> NullCounts:  # fmt: skip
    n_latents, width = len(offsets) - 1, labels.shape[1]
    if (value.dtype, labels.dtype) not in ((torch.int32, torch.int8), (torch.float32, torch.float32)):
        raise ValueError(f"value and labels must be int32 and int8 or both fp32, got {value.dtype} and {labels.dtype}")
    if row.dtype != torch.int64 or offsets.dtype != torch.int64 or row.shape != value.shape:
        raise ValueError(f"row and offsets must be int64, row [{len(value)}], got {row.dtype} {list(row.shape)}")
    if any(x.dtype != torch.float64 or len(x) != n_latents for x in (scale, shift, bar)):
        raise ValueError(f"scale, shift and bar must be fp64 [{n_latents}], got {scale.dtype} {list(scale.shape)}")
    if width % 16 or not 1 <= n <= width or not labels.is_contiguous():
        raise ValueError(f"labels must be contiguous [m, a multiple of 16 from n = {n}], got {list(labels.shape)}")
    if not all(x.is_contiguous() for x in (value, row, offsets, scale, shift, bar)):
        raise ValueError("value, row, offsets, scale, shift and bar must be contiguous")
    groups, blocks = triton.cdiv(n_latents, GROUP), triton.cdiv(n, COLUMNS)
    copies, narrow = min(COPIES, groups * blocks), value.dtype == torch.int32 and not wide
    at_least = torch.empty(blocks, n_latents, dtype=torch.int32, device=value.device)
    maxima = torch.empty(groups, n, dtype=torch.float64, device=value.device)
    histogram = torch.zeros(copies, CELLS, dtype=torch.int32, device=value.device)
    _null_counts_kernel[(groups, blocks)](
        value, row, offsets, labels, scale, shift, bar, at_least, maxima, histogram, n_latents, width, n, copies,
        TWO_SIDED=two_sided, WIDE=wide, ENTRIES=8 if narrow else 4,
        COLUMNS=min(COLUMNS, max(64, triton.next_power_of_2(n))), SHIFT=CELL_SHIFT, LOWEST=LOWEST_CELL, CELLS=CELLS,
        num_warps=4 if value.is_floating_point() else 8,
    )  # fmt: skip
    return NullCounts(at_least.sum(0), maxima.amax(0), histogram.sum(0))
