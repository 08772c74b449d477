"""Packed lists: the entries of a batch, grouped by latent, with all that a row's update reads of them.

    idx                 [capacity]          int32    n_latents marks an entry that is none
    token, acts, near   [capacity]                   as `decode_error` and `compact` leave them; near may be None
    d_acts              [blocks, capacity]  fp32     parts, to be added up

    latent              [capacity]          int16 | int32    ascending; n_latents, for none, at the end
    token, acts, d_acts, near   [capacity]           of the same entries
    offsets             [n_latents + 1]     int32    latent l owns entries offsets[l] to offsets[l + 1]

The sort is stable: entries of a latent come by rising token, so sums over them are the same in every run. A counting
sort with atomic cursors, whose order is arbitrary, was slower on an H200, since the cursors of frequent latents are in
demand. Oracle: `reference.packed_lists`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.values import LatentOrder, PackedLists

BLOCK = 1024


@triton.jit
def _gather_kernel(
    order_ptr, token_in, acts_in, d_acts_in, near_in, token_out, acts_out, d_acts_out, near_out, capacity, n_parts,
    NEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid (blocks of capacity,): each program writes its block of the four
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = p < capacity
    e = tl.load(order_ptr + p, mask=inside, other=0)
    tl.store(token_out + p, tl.load(token_in + e, mask=inside), mask=inside)
    tl.store(acts_out + p, tl.load(acts_in + e, mask=inside), mask=inside)
    d_act = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n_parts):
        d_act += tl.load(d_acts_in + e, mask=inside, other=0.0)
        d_acts_in += capacity
    tl.store(d_acts_out + p, d_act, mask=inside)
    if NEAR:
        tl.store(near_out + p, tl.load(near_in + e, mask=inside), mask=inside)


def latent_order(idx: Tensor, n_latents: int) -> LatentOrder:
    """The first part of `packed_lists`, which needs nothing but idx: to be done beside the decode."""
    if idx.dtype != torch.int32 or idx.ndim != 1:
        raise ValueError(f"idx must be int32 [capacity], got {idx.dtype} {list(idx.shape)}")
    # a radix sort of half the bits takes half the passes
    latent, order = torch.sort(idx.short() if n_latents < 2**15 else idx, stable=True)
    bounds = torch.arange(n_latents + 1, dtype=latent.dtype, device=idx.device)
    return LatentOrder(latent, order, torch.searchsorted(latent, bounds, out_int32=True))


def packed_lists(
    idx: Tensor,
    token: Tensor,
    acts: Tensor,
    d_acts: Tensor,
    n_latents: int,
    *,
    near: Tensor | None = None,
    order: LatentOrder | None = None,
) -> PackedLists:
    """The lists; ``order`` is the `latent_order` of idx, if that is there already."""
    capacity, n_parts = len(idx), len(d_acts)
    if any(t.shape[-1] != capacity for t in (token, acts, d_acts)) or d_acts.ndim != 2:
        wanted = f"token and acts [{capacity}] and d_acts [blocks, {capacity}] like idx"
        raise ValueError(f"there must be {wanted}, got {list(token.shape)}, {list(acts.shape)}, {list(d_acts.shape)}")
    order = order or latent_order(idx, n_latents)
    outs = torch.empty_like(token), torch.empty_like(acts), torch.empty_like(d_acts[0])
    near_out = None if near is None else torch.empty_like(near)
    _gather_kernel[(triton.cdiv(capacity, BLOCK),)](
        order.entry, token, acts, d_acts, near, *outs, near_out, capacity, n_parts, NEAR=near is not None, BLOCK=BLOCK
    )
    return PackedLists(order.latent, *outs, near_out, order.offsets)
