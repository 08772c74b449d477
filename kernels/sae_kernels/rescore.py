"""Rescore: the k best of each token's candidates, by their pre-activations in full precision.

    score[i, j]  = sum_d x[i, d] * w[candidates[i, j], d] + b[candidates[i, j]]      summed in fp32
    idx[i, :]    the k candidates of the largest score, of equal ones the first; ascending if the candidates are
    acts[i, :]   max(0, score)

    candidates    [n, m]           int32          of distinct latents
    x             [n, d]           fp32 | bf16
    w             [n_latents, d]   as x
    b             [n_latents]      fp32
    acts, idx     [n, k]           fp32, int32    k <= m

With the 2 k best of e4m3 scores as candidates this is closer to the exact top k than bf16 scores alone are.
Oracle: `reference.rescore`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.keys import among_largest, kth_largest, ordered, places

ROWS = 4  # of w in flight at once, in long pieces: shorter ones of more rows reach less of the memory's speed


@triton.jit
def _rescore_kernel(
    candidates_ptr, x_ptr, w_ptr, b_ptr, score_ptr, acts_ptr, idx_ptr, m, d_in, k,
    M: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # grid (n,): program n writes row n of acts and idx; row n of score is its own scratch
    n = tl.program_id(0).to(tl.int64)
    for first in range(0, m, ROWS):
        j = first + tl.arange(0, ROWS)
        latent = tl.load(candidates_ptr + n * m + j, mask=j < m, other=0).to(tl.int64)
        total = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for at in range(0, d_in, BLOCK_D):
            d = at + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + n * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
            inside = (j < m)[:, None] & (d < d_in)[None, :]
            total += tl.load(w_ptr + latent[:, None] * d_in + d[None, :], mask=inside, other=0.0).to(tl.float32) * x
        tl.store(score_ptr + n * m + j, tl.sum(total, 1) + tl.load(b_ptr + latent), mask=j < m)
    tl.debug_barrier()
    j = tl.arange(0, M)
    score = tl.load(score_ptr + n * m + j, mask=j < m, other=float("-inf"), cache_modifier=".cg")
    latent = tl.load(candidates_ptr + n * m + j, mask=j < m, other=0)
    key = ordered(score, 0)
    low = tl.min(tl.where(j < m, key, 2147483647))
    chosen = among_largest(key, k, kth_largest(key, k, low, tl.max(key))) & (j < m)
    place = places(chosen)
    tl.store(acts_ptr + n * k + place, tl.maximum(score, 0.0, propagate_nan=tl.PropagateNan.ALL), mask=chosen)
    tl.store(idx_ptr + n * k + place, latent, mask=chosen)


def rescore(candidates: Tensor, x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The activations [n, k] and their latents [n, k]."""
    (n, m), d_in = candidates.shape, x.shape[1]
    if candidates.dtype != torch.int32 or not 1 <= k <= m:
        raise ValueError(
            f"candidates must be int32 [n, at least k = {k}], got {candidates.dtype} {list(candidates.shape)}"
        )
    if w.dtype != x.dtype or w.shape[1] != d_in or len(x) != n:
        raise ValueError(f"x and w must be {w.dtype} [{n}, {w.shape[1]}] and [n_latents, ...], got {list(x.shape)}")
    score, acts = (torch.empty(n, width, dtype=torch.float32, device=x.device) for width in (m, k))
    idx = torch.empty(n, k, dtype=torch.int32, device=x.device)
    block = min(1024, max(256, triton.next_power_of_2(d_in + 1) // 8))
    _rescore_kernel[(n,)](
        candidates, x, w, b, score, acts, idx, m, d_in, k, M=triton.next_power_of_2(m), ROWS=ROWS, BLOCK_D=block,
        num_warps=block // 256,
    )  # fmt: skip
    return acts, idx
