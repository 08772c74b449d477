"""Bias update: Adam on b_dec, whose gradient is the sum of the errors of all tokens.

    g[j] = scale * sum_i pull[i, j]  * FACTOR        m, v, b as torch.optim.Adam

    pull       [n, d]    fp32 | bf16    plane 0 of `decode_error`
    b, m, v    [d]       fp32
    norms      None or [d] fp32         write g^2 before FACTOR there, and update nothing

Two kernels: sums over blocks of tokens, then their sum in order, so the bits are the same in every run.
Oracle: `reference.bias_update`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.adam import adam
from sae_kernels.scalars import FACTOR
from sae_kernels.values import BLOCK_N

BLOCK_D = 128


@triton.jit
def _column_sums_kernel(pull_ptr, sums_ptr, n, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr):
    # grid (blocks of tokens, blocks of columns)
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((STEP, BLOCK_D), tl.float32)
    for at in range(0, BLOCK_N, STEP):
        i = tl.program_id(0) * BLOCK_N + at + tl.arange(0, STEP)
        inside = (i < n)[:, None] & (j < d)[None, :]
        total += tl.load(pull_ptr + i[:, None].to(tl.int64) * d + j[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0) * d + j, tl.sum(total, 0), mask=j < d)


@triton.jit
def _bias_kernel(
    sums_ptr, b_ptr, m_ptr, v_ptr, norms_ptr, scalars_ptr, scale, n_sums, d, BLOCK_D: tl.constexpr, UPDATE: tl.constexpr
):
    # grid (blocks of columns,)
    j = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = j < d
    total = tl.zeros((8, BLOCK_D), tl.float32)
    for at in range(0, n_sums, 8):
        i = at + tl.arange(0, 8)
        real = (i < n_sums)[:, None] & inside[None, :]
        total += tl.load(sums_ptr + i[:, None] * d + j[None, :], mask=real, other=0.0)
    g = tl.sum(total, 0) * scale
    if UPDATE:
        factor = tl.load(scalars_ptr + FACTOR)
        if factor > 0:
            m, v = tl.load(m_ptr + j, mask=inside, other=0.0), tl.load(v_ptr + j, mask=inside, other=0.0)
            b, m, v = adam(tl.load(b_ptr + j, mask=inside, other=0.0), m, v, g * factor, scalars_ptr)
            tl.store(b_ptr + j, b, mask=inside)
            tl.store(m_ptr + j, m, mask=inside)
            tl.store(v_ptr + j, v, mask=inside)
    else:
        tl.store(norms_ptr + j, g * g, mask=inside)


def column_sums(pull: Tensor) -> Tensor:
    """Sums over blocks of tokens: [blocks, d] fp32."""
    n, d = pull.shape
    sums = torch.empty(triton.cdiv(n, BLOCK_N), d, dtype=torch.float32, device=pull.device)
    _column_sums_kernel[(len(sums), triton.cdiv(d, BLOCK_D))](
        pull, sums, n, d, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, STEP=16, num_warps=4
    )
    return sums


def bias_update(
    b: Tensor, m: Tensor, v: Tensor, sums: Tensor, scalars: Tensor, *, scale: float, norms: Tensor | None = None
) -> None:
    """Update b [d], m and v in place from the `column_sums` of the errors."""
    n_sums, d = sums.shape
    if b.shape != (d,) or b.dtype != torch.float32:
        raise ValueError(f"b must be fp32 [{d}] like the columns of sums, got {b.dtype} {list(b.shape)}")
    _bias_kernel[(triton.cdiv(d, 32),)](
        sums, b, m, v, norms, scalars, scale, n_sums, d, BLOCK_D=32, UPDATE=norms is None, num_warps=1
    )
