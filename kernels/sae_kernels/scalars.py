"""The few numbers of a step that live on the device, so that no kernel waits for the host.

    scalars [9] fp32    places below; `begin` writes what the host knows, `conclude` what the step found

    LR, M_FIX, V_FIX     learning rate; 1 / (1 - beta^t) of Adam's two moments
    FACTOR               what gradients are multiplied with: 1, less when they are clipped; 0: leave all as it is
    AUX                  weight of the AuxK gradients
    COUNT                gradient of the sparsity loss of JumpReLU with respect to one active entry
    STEP                 number of the step, from 1: seeds the stochastic rounding
    LOSS                 mean over tokens of the squared error (the mean over prefixes of it)
    FLAGGED              steps so far whose loss was not finite; they changed nothing

Oracle: `reference.conclude`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels import values

LR, M_FIX, V_FIX = map(tl.constexpr, (values.LR, values.M_FIX, values.V_FIX))
FACTOR, AUX, COUNT = map(tl.constexpr, (values.FACTOR, values.AUX, values.COUNT))
STEP, LOSS, FLAGGED = map(tl.constexpr, (values.STEP, values.LOSS, values.FLAGGED))


def new_scalars(device: torch.device | str) -> Tensor:
    return torch.zeros(9, dtype=torch.float32, device=device)


@triton.jit
def _begin_kernel(scalars_ptr, lr, m_fix, v_fix, step):
    # grid (1,): one program writes all
    tl.store(scalars_ptr + LR, lr)
    tl.store(scalars_ptr + M_FIX, m_fix)
    tl.store(scalars_ptr + V_FIX, v_fix)
    tl.store(scalars_ptr + STEP, step)


@triton.jit
def _conclude_kernel(
    scalars_ptr, squares_ptr, active_ptr, n_dead_ptr, n_squares, n, k, sparsity_coef, auxk_coef, k_aux,
    BLOCK: tl.constexpr, JUMP: tl.constexpr, AUXK: tl.constexpr,
):  # fmt: skip
    # grid (1,): one program writes all
    total, active = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for at in range(0, n_squares, BLOCK):
        i = at + tl.arange(0, BLOCK)
        total += tl.load(squares_ptr + i, mask=i < n_squares, other=0.0)
        if JUMP:
            active += tl.load(active_ptr + i, mask=i < n, other=0)
    loss = tl.sum(total) / n
    finite = (loss - loss == 0.0).to(tl.float32)  # false for NaN and infinity
    tl.store(scalars_ptr + LOSS, loss)
    tl.store(scalars_ptr + FACTOR, finite)
    tl.store(scalars_ptr + FLAGGED, tl.load(scalars_ptr + FLAGGED) + 1 - finite)
    if JUMP:
        l0 = tl.sum(active).to(tl.float32) / n
        tl.store(scalars_ptr + COUNT, 2 * sparsity_coef * (l0 / k - 1) / (k * n))
    if AUXK:
        share = tl.minimum(tl.load(n_dead_ptr).to(tl.float32) / k_aux, 1.0)
        tl.store(scalars_ptr + AUX, auxk_coef * share * 2 / n)


@triton.jit
def _clip_kernel(scalars_ptr, norms_ptr, n_norms, clip, BLOCK: tl.constexpr):
    # grid (1,): one program writes all
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, n_norms, BLOCK):
        i = at + tl.arange(0, BLOCK)
        total += tl.load(norms_ptr + i, mask=i < n_norms, other=0.0)
    factor = tl.minimum(clip / (tl.sqrt(tl.sum(total)) + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    factor = tl.where(factor == factor, factor, 0.0)  # a norm that is NaN cannot be cut: leave all as it is
    tl.store(scalars_ptr + FACTOR, tl.load(scalars_ptr + FACTOR) * factor)


def begin(scalars: Tensor, lr: float, step: int, betas: tuple[float, float]) -> None:
    """Tell the device the learning rate and the bias corrections of step ``step``, counted from 1."""
    m_fix, v_fix = (1 / (1 - beta**step) for beta in betas)
    _begin_kernel[(1,)](scalars, float(lr), m_fix, v_fix, float(step), num_warps=1)


def conclude(
    scalars: Tensor, squares: Tensor, *, active: Tensor | None = None, k: int = 1, sparsity_coef: float = 0.0,
    n_dead: Tensor | None = None, auxk_coef: float = 0.0, k_aux: int = 1,
) -> None:  # fmt: skip
    """Write LOSS, FACTOR and FLAGGED from squares [blocks, n].

    With ``active`` [n] int32 COUNT too, with ``n_dead`` [] int32 AUX.
    """
    n = squares.shape[-1]
    block = min(32768, triton.next_power_of_2(squares.numel()))
    _conclude_kernel[(1,)](
        scalars, squares, active, n_dead, squares.numel(), n, float(k), float(sparsity_coef), float(auxk_coef),
        float(k_aux), BLOCK=block, JUMP=active is not None, AUXK=n_dead is not None, num_warps=16,
    )  # fmt: skip


def clip_factor(scalars: Tensor, norms: Tensor, clip: float) -> None:
    """Multiply FACTOR so that gradients whose squared norms are ``norms`` [m] have no norm above ``clip``."""
    _clip_kernel[(1,)](scalars, norms, len(norms), float(clip), BLOCK=8192, num_warps=8)
