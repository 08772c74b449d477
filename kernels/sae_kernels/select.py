"""Select: the k largest pre-activations of each token, found by way of the chunk maxima.

    idx[i, :]    the k largest of pre[i, :n_latents], of equal ones the lowest index; ascending
    acts[i, :]   max(0, pre[i, idx[i, :]])

    pre       [n, padded]        fp32 | bf16    as `encode` leaves it
    maxima    [n, padded / chunk]   as pre
    acts      [n, k]             fp32
    idx       [n, k]             int32

A chunk whose maximum is not among the k largest maxima (of equal ones the first) holds nothing of the top k: k
entries elsewhere are larger, or as large and before it. So k chunks a token are read. Exact: the same values
as `torch.topk`, and unlike there ties are settled. Oracle: `reference.select`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.keys import among_largest, kth_largest, ordered, places

MAX_CANDIDATES = 2**14  # in the registers of one program


@triton.jit
def _select_kernel(
    pre_ptr, maxima_ptr, chunk_ptr, acts_ptr, idx_ptr, n_latents, padded, n_chunks, k,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, K: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    # grid (n,): program n writes row n of acts and idx; row n of chunk is its own scratch
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS)
    maxima = tl.load(maxima_ptr + n * n_chunks + c, mask=c < n_chunks, other=float("-inf"))
    key = ordered(maxima, SHIFT)
    n_chosen = tl.minimum(k, n_chunks)
    high = tl.max(key)
    level = kth_largest(key, n_chosen, tl.min(tl.where(c < n_chunks, key, 2147483647)), high)
    chosen = among_largest(key, n_chosen, level) & (c < n_chunks)
    tl.store(chunk_ptr + n * k + places(chosen), c, mask=chosen)
    tl.debug_barrier()
    j = tl.arange(0, K)
    chunk = tl.load(chunk_ptr + n * k + j, mask=j < n_chosen, other=0, cache_modifier=".cg")
    latent = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    candidate = (j < n_chosen)[:, None] & (latent < n_latents)
    pre = tl.load(pre_ptr + n * padded + latent, mask=candidate, other=float("-inf")).to(tl.float32)
    pre, candidate = tl.reshape(pre, (K * CHUNK,)), tl.reshape(candidate, (K * CHUNK,))
    key = ordered(pre, SHIFT)
    # k chunks hold k values that reach the k-th largest maximum; with fewer chunks every value is a candidate
    low = tl.where(n_chosen < k, tl.min(tl.where(candidate, key, 2147483647)), level)
    chosen = among_largest(key, k, kth_largest(key, k, low, high)) & candidate
    place = places(chosen)
    tl.store(acts_ptr + n * k + place, tl.maximum(pre, 0.0, propagate_nan=tl.PropagateNan.ALL), mask=chosen)
    # the chunks once more, so that no register holds the latents of all candidates meanwhile
    chunk = tl.load(chunk_ptr + n * k + j, mask=j < n_chosen, other=0, cache_modifier=".cg")
    latent = tl.reshape(chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :], (K * CHUNK,))
    tl.store(idx_ptr + n * k + place, latent, mask=chosen)


def select(pre: Tensor, maxima: Tensor, n_latents: int, k: int) -> tuple[Tensor, Tensor]:
    """The activations [n, k] and their latents [n, k]."""
    n, n_chunks = maxima.shape
    chunk = check_maxima(pre, maxima)
    if not 1 <= k <= n_latents:
        raise ValueError(f"k must be between 1 and n_latents = {n_latents}, got {k}")
    width = triton.next_power_of_2(k)
    if width * chunk > MAX_CANDIDATES:
        raise ValueError(f"k must be at most {MAX_CANDIDATES // chunk}, got {k}")
    acts = torch.empty(n, k, dtype=torch.float32, device=pre.device)
    idx, scratch = (torch.empty(n, k, dtype=torch.int32, device=pre.device) for _ in range(2))
    chunks = triton.next_power_of_2(n_chunks)
    _select_kernel[(n,)](
        pre, maxima, scratch, acts, idx, n_latents, pre.shape[1], n_chunks, k,
        CHUNK=chunk, CHUNKS=chunks, K=width, SHIFT=16 if pre.dtype == torch.bfloat16 else 0,
        num_warps=warps_for(max(width * chunk, chunks)),
    )  # fmt: skip
    return acts, idx


def warps_for(width: int) -> int:
    """Warps that search ``width`` keys: few wait less for each other, many hold more keys."""
    return 2 if width <= 1024 else 4 if width <= 8192 else 8


def check_maxima(pre: Tensor, maxima: Tensor) -> int:
    """The size of a chunk. ValueError if these are not what `encode` leaves."""
    n, n_chunks = maxima.shape
    chunk = pre.shape[1] // n_chunks
    if pre.shape != (n, n_chunks * chunk) or maxima.dtype != pre.dtype or chunk & (chunk - 1):
        raise ValueError(f"pre must be [{n}, chunks of {n_chunks}] like its maxima, got {list(pre.shape)}")
    if pre.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"pre must be fp32 or bf16, got {pre.dtype}")
    return chunk
