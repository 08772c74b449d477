"""Prepare a batch: centre, scale, reorder and round it for the products.

    z[i, j]     = (x[i, order[j]] - mean[j]) * scale      for j < d_in, 0 for the columns that pad it to d

    x           [n, d_in]      fp32 | bf16 | fp16
    order       None or [d_in] int32          a permutation; None: as they are
    mean        [d_in]         fp32           in that order
    z           [n, d]         fp32 | bf16    d >= d_in
    z8          [n, d]         e4m3           z over its row scale; 0 in the first `side` columns
    z8_scale    [n]            fp32           largest |z| of the row beyond the side columns, over 448

The side columns are those whose values are so much larger than the others' that e4m3's relative error in them would
drown the rest: `encode` multiplies them in bf16. Oracle: `reference.prepare`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.values import FP8_LARGEST

FP8 = torch.float8_e4m3fn
FP8_MAX = tl.constexpr(FP8_LARGEST)
TINY = tl.constexpr(1e-30)  # a row of zeros has a scale, too


@triton.jit
def _prepare_kernel(
    x_ptr, order_ptr, mean_ptr, z_ptr, z8_ptr, z8_scale_ptr, scale, d_in, d, side,
    BLOCK: tl.constexpr, FP8: tl.constexpr, REORDER: tl.constexpr,
):  # fmt: skip
    # grid (n,): program n writes row n
    n = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    real = j < d_in
    column = j
    if REORDER:
        column = tl.load(order_ptr + j, mask=real, other=0)
    x = tl.load(x_ptr + n * d_in + column, mask=real, other=0.0).to(tl.float32)
    z = tl.where(real, (x - tl.load(mean_ptr + j, mask=real, other=0.0)) * scale, 0.0)
    tl.store(z_ptr + n * d + j, z, mask=j < d)
    if FP8:
        z = tl.where(j < side, 0.0, z)
        unit = tl.maximum(tl.max(tl.abs(z), 0), TINY) / FP8_MAX
        tl.store(z8_ptr + n * d + j, (z * (1 / unit)).to(tl.float8e4nv), mask=j < d)
        tl.store(z8_scale_ptr + n, unit)


def prepare(
    x: Tensor,
    order: Tensor | None,
    mean: Tensor,
    scale: float,
    *,
    z: Tensor,
    z8: Tensor | None = None,
    z8_scale: Tensor | None = None,
    side: int = 0,
) -> None:
    """Fill ``z`` and, when given, ``z8`` and ``z8_scale``."""
    (n, d_in), d = x.shape, z.shape[1]
    if not x.is_floating_point() or len(mean) != d_in or len(z) != n:
        raise ValueError(f"x must be floats [{len(z)}, {len(mean)}], got {x.dtype} {list(x.shape)}")
    block = triton.next_power_of_2(d)
    _prepare_kernel[(n,)](
        x.contiguous(),
        order,
        mean,
        z,
        z8,
        z8_scale,
        scale,
        d_in,
        d,
        side,
        BLOCK=block,
        FP8=z8 is not None,
        REORDER=order is not None,
        num_warps=max(1, min(8, block // 256)),
    )
