"""An fp32 weight kept as two 16-bit halves, of which the upper is the bf16 copy that products read.

    w        [n_latents, d]   fp32
    high     [n_latents, d]   bf16     w rounded to the nearest bf16, halves away from zero
    low      [n_latents, d]   int16    bits(w) - bits(high), so join(split(w)) == w to the last bit

A master in fp32 beside a bf16 copy costs 6 bytes a weight and 10 of traffic an update; this costs 4 and 8. Infinities
and NaN do not survive. Oracles: `reference.split`, `reference.join`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4096  # at a time, so that no temporary is as large as the weight


def split(w: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Both halves, on ``device`` (None: where w is)."""
    device = w.device if device is None else device
    high, low = (torch.empty(w.shape, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.int16))
    for part, h, x in zip(w.split(ROWS), high.split(ROWS), low.split(ROWS), strict=True):
        bits = part.to(device).contiguous().view(torch.int32)
        upper = (bits + 0x8000) >> 16
        h.view(torch.int16).copy_(upper)
        x.copy_(bits - (upper << 16))
    return high, low


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 weight."""
    w = torch.empty_like(high, dtype=torch.float32)
    for part, h, x in zip(w.split(ROWS), high.split(ROWS), low.split(ROWS), strict=True):
        part.view(torch.int32).copy_((h.view(torch.int16).int() << 16) + x.int())
    return w


@triton.jit
def joined(high, low):
    """fp32 of the two halves, in registers."""
    return (high.to(tl.float32).to(tl.int32, bitcast=True) + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def halves(w):
    """The two halves of fp32, in registers; the first as fp32 that bf16 holds exactly."""
    bits = w.to(tl.int32, bitcast=True)
    upper = ((bits + 0x8000) >> 16) << 16
    return upper.to(tl.float32, bitcast=True), (bits - upper).to(tl.int16)
