"""Winners: what of a rank's k largest activations is among the k largest of all ranks', as CSR.

    everyone  [ranks, n, k]   fp32     what `select` gave each rank
    idx       [n, k]          int32    this rank's latents, ascending

    acts      [n * k]         fp32     the winners' activations: never 0
    idx       [n * k]         int32    their latents, ascending within a token; n_latents behind the last entry
    offsets   [n + 1]         int32    token i owns entries offsets[i] to offsets[i + 1]
    active    [n]             int32    winners on all ranks

Ranks hold ascending blocks of latents, so the candidates of a token, one rank after the other, ascend, and of equal
ones the first is that of the lowest latent. Only activations need to be exchanged: each rank finds the same k, and
knows the latents of its own. Oracle: `reference.winners`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.keys import among_largest, kth_largest, ordered, places
from sae_kernels.values import Entries

MAX_CANDIDATES = 2**14  # in the registers of one program
BLOCK = 1024


@triton.jit
def _winners_kernel(everyone_ptr, place_ptr, count_ptr, active_ptr, rank, n_tokens, m, k, M: tl.constexpr):
    # grid (n,): program n writes row n of place, -1 for what does not win, and its two counts; m = ranks * k
    n = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, M)
    act = tl.load(everyone_ptr + ((j // k) * n_tokens + n) * k + j % k, mask=j < m, other=0.0)
    key = tl.where(j < m, ordered(act, 0), -2147483648)
    level = kth_largest(key, k, tl.min(tl.where(j < m, key, 2147483647)), tl.max(key))
    # not act > 0, so that a NaN wins, too, and is seen in the loss
    wins = among_largest(key, k, level) & (j < m) & ~(act <= 0)
    own = (j // k) == rank
    tl.store(place_ptr + n * k + j % k, tl.where(wins, places(wins & own), -1), mask=own & (j < m))
    tl.store(count_ptr + n, tl.sum((wins & own).to(tl.int32)))
    tl.store(active_ptr + n, tl.sum(wins.to(tl.int32)))


@triton.jit
def _move_kernel(acts_in, idx_in, place_ptr, offsets_ptr, acts_out, idx_out, size, k, BLOCK: tl.constexpr):
    # grid (blocks of n * k,)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(place_ptr + p, mask=p < size, other=-1)
    wins = place >= 0
    e = tl.load(offsets_ptr + p // k, mask=wins, other=0) + place
    tl.store(acts_out + e, tl.load(acts_in + p, mask=wins, other=0.0), mask=wins)
    tl.store(idx_out + e, tl.load(idx_in + p, mask=wins, other=0), mask=wins)


def winners(everyone: Tensor, idx: Tensor, rank: int, n_latents: int) -> Entries:
    """The winners of one rank, whose ``n_latents`` are numbered from 0."""
    ranks, n, k = everyone.shape
    if everyone.dtype != torch.float32 or idx.dtype != torch.int32 or idx.shape != (n, k):
        wanted = f"fp32 [ranks, n, k] and int32 [{n}, {k}]"
        raise ValueError(f"everyone and idx must be {wanted}, got {everyone.dtype} and {idx.dtype} {list(idx.shape)}")
    width = triton.next_power_of_2(ranks * k)
    if width > MAX_CANDIDATES:
        raise ValueError(f"{ranks} ranks times k must be at most {MAX_CANDIDATES}, got {ranks * k}")
    everyone, idx = everyone.contiguous(), idx.contiguous()
    place, offsets = torch.empty_like(idx), torch.zeros(n + 1, dtype=torch.int32, device=idx.device)
    count, active = torch.empty(2, n, dtype=torch.int32, device=idx.device)
    warps = 1 if width <= 256 else 4
    _winners_kernel[(n,)](everyone, place, count, active, rank, n, ranks * k, k, M=width, num_warps=warps)
    torch.cumsum(count, 0, dtype=torch.int32, out=offsets[1:])
    acts = torch.zeros(n * k, dtype=torch.float32, device=idx.device)
    latents = torch.full((n * k,), n_latents, dtype=torch.int32, device=idx.device)
    _move_kernel[(triton.cdiv(n * k, BLOCK),)](
        everyone[rank], idx, place, offsets, acts, latents, n * k, k, BLOCK=BLOCK, num_warps=4
    )
    return Entries(acts, latents, offsets, active=active)
