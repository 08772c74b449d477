"""AuxK's parts that are no dense products: what the dead latents of each token are, and their rows.

    kept[i, s]  = max(0, pre[i, dead[s]]) if that is among the k_aux largest of the token's dead (of equal ones the
                  first), else 0

    pruned[i, s] = kept[i, s] if it is among the k_aux largest of all ranks' kept of the token (of equal ones those of
                   the first rank), else 0: for ranks that share the latents

    rows[s, :]  = w[dead[s], :] * inverse_norm[dead[s]], 0 for a place that is none
    dots[s]     = a[s, :] . b[s, :]

    pre     [n, padded]      fp32 | bf16    as `encode` leaves it
    dead    [m]              int32          latents; n_latents marks a place that is none
    kept    [n, m]           as pre         m <= 32768, of all ranks together
    w, rows, a, b            fp32 | bf16    [n_latents, d], [m, d], [m, d], [m, d]; dots and inverse_norm fp32

The dead are a small share, and k_aux of them a large part of that: dense products over the dead alone are faster than
sparse ones. Oracles: `reference.keep_auxk`, `reference.prune_auxk`, `reference.scaled_rows`, `reference.row_dots`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.keys import among_largest, kth_largest, ordered

MAX_DEAD = 2**15  # keys in the registers of one program


@triton.jit
def _keep_auxk_kernel(pre_ptr, dead_ptr, kept_ptr, k_aux, m, n_latents, padded, M: tl.constexpr, SHIFT: tl.constexpr):
    # grid (n,): program n writes kept[n, :]
    n = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, M)
    latent = tl.load(dead_ptr + s, mask=s < m, other=n_latents)
    pre = tl.load(pre_ptr + n * padded + latent, mask=latent < n_latents, other=0.0).to(tl.float32)
    pre = tl.maximum(pre, 0.0, propagate_nan=tl.PropagateNan.ALL)
    key = ordered(pre, SHIFT)
    chosen = among_largest(key, k_aux, kth_largest(key, k_aux, tl.min(key), tl.max(key)))
    tl.store(kept_ptr + n * m + s, tl.where(chosen, pre, 0.0), mask=s < m)


def keep_auxk(pre: Tensor, dead: Tensor, n_latents: int, k_aux: int, *, kept: Tensor | None = None) -> Tensor:
    """``kept`` [n, m], made when None."""
    n, m = len(pre), len(dead)
    if dead.dtype != torch.int32 or m > MAX_DEAD:
        raise ValueError(f"dead must be int32 of at most {MAX_DEAD}, got {dead.dtype} {list(dead.shape)}")
    kept = torch.empty(n, m, dtype=pre.dtype, device=pre.device) if kept is None else kept
    width = triton.next_power_of_2(m)
    _keep_auxk_kernel[(n,)](
        pre, dead, kept, min(k_aux, m), m, n_latents, pre.shape[1], M=width,
        SHIFT=16 if pre.dtype == torch.bfloat16 else 0, num_warps=4 if width <= 4096 else 8 if width <= 16384 else 16,
    )  # fmt: skip
    return kept


@triton.jit
def _prune_auxk_kernel(
    everyone_ptr, kept_ptr, rank, k_aux, n_tokens, m, size, M: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    # grid (n,): program n writes kept[n, :]; size = ranks * m
    n = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, M)
    value = tl.load(everyone_ptr + ((s // m) * n_tokens + n) * m + s % m, mask=s < size, other=0.0).to(tl.float32)
    key = ordered(value, SHIFT)
    low = tl.min(tl.where(s < size, key, 2147483647))
    key = tl.where(s < size, key, -2147483648)
    chosen = among_largest(key, k_aux, kth_largest(key, k_aux, low, tl.max(key)))
    tl.store(kept_ptr + n * m + s % m, tl.where(chosen, value, 0.0), mask=(s // m == rank) & (s < size))


def prune_auxk(everyone: Tensor, k_aux: int, rank: int, *, kept: Tensor) -> None:
    """``kept`` [n, m] of one rank, from that of all, [ranks, n, m]."""
    ranks, n, m = everyone.shape
    if kept.shape != (n, m) or kept.dtype != everyone.dtype or ranks * m > MAX_DEAD:
        wanted = f"{everyone.dtype} [{n}, {m}], of at most {MAX_DEAD} on all ranks"
        raise ValueError(f"kept must be {wanted}, got {kept.dtype} {list(kept.shape)} on each of {ranks}")
    width = triton.next_power_of_2(ranks * m)
    _prune_auxk_kernel[(n,)](
        everyone, kept, rank, min(k_aux, ranks * m), n, m, ranks * m, M=width,
        SHIFT=16 if kept.dtype == torch.bfloat16 else 0, num_warps=4 if width <= 4096 else 8 if width <= 16384 else 16,
    )  # fmt: skip


@triton.jit
def _scaled_rows_kernel(w_ptr, inverse_norm_ptr, dead_ptr, rows_ptr, n_latents, d, BLOCK_D: tl.constexpr):
    # grid (m,): program s writes rows[s, :]
    s = tl.program_id(0).to(tl.int64)
    latent = tl.load(dead_ptr + s).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    real = (column < d) & (tl.zeros_like(column) + latent < n_latents)
    scale = tl.load(inverse_norm_ptr + latent, mask=latent < n_latents, other=0.0)
    w = tl.load(w_ptr + latent * d + column, mask=real, other=0.0).to(tl.float32)
    tl.store(rows_ptr + s * d + column, w * scale, mask=column < d)


@triton.jit
def _row_dots_kernel(a_ptr, b_ptr, dots_ptr, d, BLOCK_D: tl.constexpr):
    # grid (m,): program s writes dots[s]
    s = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    a = tl.load(a_ptr + s * d + column, mask=column < d, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + s * d + column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(dots_ptr + s, tl.sum(a * b))


def scaled_rows(w: Tensor, inverse_norm: Tensor, dead: Tensor) -> Tensor:
    """``rows`` [m, d]."""
    n_latents, d = w.shape
    rows = torch.empty(len(dead), d, dtype=w.dtype, device=w.device)
    _scaled_rows_kernel[(len(dead),)](w, inverse_norm, dead, rows, n_latents, d, BLOCK_D=triton.next_power_of_2(d))
    return rows


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """``dots`` [m]."""
    m, d = a.shape
    if b.shape != a.shape:
        raise ValueError(f"b must be {list(a.shape)} like a, got {list(b.shape)}")
    dots = torch.empty(m, dtype=torch.float32, device=a.device)
    _row_dots_kernel[(m,)](a.contiguous(), b.contiguous(), dots, d, BLOCK_D=triton.next_power_of_2(d))
    return dots
