"""Adam on values in registers, as torch.optim.Adam, and its moments in bf16: parts of kernels.

bf16 has eight bits: rounded to nearest, a second moment that should grow by a thousandth would stand still. Rounded up
with the probability that is the part cut off, it is right on average.
"""

import triton
import triton.language as tl

from sae_kernels.scalars import LR, M_FIX, STEP, V_FIX
from sae_kernels.values import BETAS, EPS

BETA1, BETA2, EPSILON = tl.constexpr(BETAS[0]), tl.constexpr(BETAS[1]), tl.constexpr(EPS)


@triton.jit
def adam(w, m, v, g, scalars_ptr, faster=1.0, EXACT: tl.constexpr = False):
    """The weight and both moments after a step with gradient g, at LR times ``faster``.

    EXACT rounds root and quotient as IEEE does; without, they are a unit or two off, and twice as fast.
    """
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    lr, m_fix, v_fix = tl.load(scalars_ptr + LR), tl.load(scalars_ptr + M_FIX), tl.load(scalars_ptr + V_FIX)
    if EXACT:
        return w - faster * lr * tl.div_rn(m * m_fix, tl.sqrt_rn(v * v_fix) + EPSILON), m, v
    return w - faster * lr * (m * m_fix) / (tl.sqrt(v * v_fix) + EPSILON), m, v


@triton.jit
def stochastic_bits(element, scalars_ptr, SALT: tl.constexpr):
    """32 random bits an element and step, by the lowbias32 hash: ten instructions, where Philox outlasts the memory."""
    step = tl.load(scalars_ptr + STEP).to(tl.uint32)
    x = element.to(tl.uint32) ^ ((2 * step + SALT) * 0x9E3779B9)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)).to(tl.int32, bitcast=True)


@triton.jit
def store_moment(ptr, value, bits, mask, ROUND: tl.constexpr):
    """Store fp32, or bf16 rounded by the lower 16 of the random bits."""
    if ROUND:
        raised = value.to(tl.int32, bitcast=True) + (bits & 0xFFFF)
        value = ((raised >> 16) << 16).to(tl.float32, bitcast=True)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")
