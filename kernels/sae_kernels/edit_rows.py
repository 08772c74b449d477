"""Several edits of the residual stream in one pass over it.

    f     = sum of enc * x + bias, 0 where that is not above threshold
    delta = min(max(slope * f + shift, low), high) - f      where on, else 0
    out   = x + sum over m of delta * dec                   where a delta is not 0, else x bit for bit

    x                [n, d]        fp32 | bf16 | fp16
    on               [n, m]        bool
    enc, dec         [m, d]        fp32          m <= 128
    bias, threshold  [m]           fp32          -inf: no threshold
    line             [m, 4]        fp32          slope, shift, low, high
    out              [n, d]        as x          row-major

A program holds BLOCK_N tokens: it reads them once for f and, from the cache, once more to write them. Sums are in fp32
(IEEE products) in a fixed order, so the same bits come out on every run; nothing waits for the host, so a CUDA graph
can hold it. Gradients do not flow. Oracle: `reference.edit_rows`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROWS = 128
BLOCK_D = 64


@triton.jit
def _edit_rows_kernel(
    x_ptr, on_ptr, enc_ptr, bias_ptr, threshold_ptr, dec_ptr, line_ptr, out_ptr, n, d, m,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # grid (cdiv(n, BLOCK_N),): a program edits BLOCK_N tokens
    i = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    j, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    rows, edits = i < n, j < m
    f = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in range(0, d, BLOCK_D):
        columns = at + c < d
        x = tl.load(x_ptr + i[:, None] * d + at + c[None, :], mask=rows[:, None] & columns[None, :], other=0.0)
        e = tl.load(enc_ptr + j[None, :] * d + at + c[:, None], mask=edits[None, :] & columns[:, None], other=0.0)
        f = tl.dot(x.to(tl.float32), e, f, input_precision="ieee")
    f += tl.load(bias_ptr + j, mask=edits, other=0.0)[None, :]
    threshold = tl.load(threshold_ptr + j, mask=edits, other=0.0)
    f = tl.where(f > threshold[None, :], f, 0.0)
    slope = tl.load(line_ptr + j * 4, mask=edits, other=1.0)
    shift = tl.load(line_ptr + j * 4 + 1, mask=edits, other=0.0)
    low = tl.load(line_ptr + j * 4 + 2, mask=edits, other=0.0)
    high = tl.load(line_ptr + j * 4 + 3, mask=edits, other=0.0)
    to = tl.minimum(tl.maximum(slope[None, :] * f + shift[None, :], low[None, :]), high[None, :])
    on = tl.load(on_ptr + i[:, None] * m + j[None, :], mask=rows[:, None] & edits[None, :], other=0)
    delta = tl.where(on != 0, to - f, 0.0)
    changed = tl.sum((delta != 0).to(tl.int32), axis=1) > 0
    for at in range(0, d, BLOCK_D):
        inside = rows[:, None] & (at + c < d)[None, :]
        x = tl.load(x_ptr + i[:, None] * d + at + c[None, :], mask=inside, other=0.0)
        w = tl.load(dec_ptr + j[:, None] * d + at + c[None, :], mask=edits[:, None] & (at + c < d)[None, :], other=0.0)
        moved = tl.dot(delta, w, x.to(tl.float32), input_precision="ieee").to(x.dtype)
        tl.store(out_ptr + i[:, None] * d + at + c[None, :], tl.where(changed[:, None], moved, x), mask=inside)


def edit_rows(x: Tensor, on: Tensor, enc: Tensor, bias: Tensor, threshold: Tensor, dec: Tensor, line: Tensor) -> Tensor:
    (n, d), m = x.shape, len(enc)
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be one of {DTYPES}, got {x.dtype}")
    if not 1 <= m <= MAX_ROWS or enc.shape != (m, d) or dec.shape != (m, d):
        shapes = f"{list(enc.shape)} and {list(dec.shape)}"
        raise ValueError(f"enc and dec must be [m, {d}] with m from 1 to {MAX_ROWS}, got {shapes}")
    if on.dtype != torch.bool or on.shape != (n, m) or line.shape != (m, 4):
        raise ValueError(
            f"on must be bool {[n, m]} and line {[m, 4]}, got {on.dtype} {list(on.shape)}, {list(line.shape)}"
        )
    if any(w.dtype != torch.float32 for w in (enc, bias, threshold, dec, line)):
        raise ValueError("enc, bias, threshold, dec and line must be fp32")
    x, on = x.contiguous(), on.contiguous()
    out = torch.empty_like(x)
    block_m = max(16, triton.next_power_of_2(m))
    grid = (triton.cdiv(n, 16),)
    if n:
        _edit_rows_kernel[grid](
            x, on, enc.contiguous(), bias, threshold, dec.contiguous(), line.contiguous(), out, n, d, m,
            BLOCK_N=16, BLOCK_M=block_m, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return out
