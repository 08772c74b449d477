"""Compact: the pre-activations above a level, as CSR, for rules with a varying number a token.

BatchTopK: the n * k largest positive ones of the batch, of equal ones those that come first.
JumpReLU:  those with pre > threshold[l] (they fire), or within half a bandwidth of it (its gradient needs them).

    pre        [n, padded]          fp32 | bf16    as `encode` leaves it
    maxima     [n, padded / chunk]  as pre
    offsets    [n + 1]              int32          token i owns entries offsets[i] to offsets[i + 1]
    idx        [capacity]           int32          ascending within a token; n_latents behind the last entry
    acts       [capacity]           fp32           0 where a JumpReLU latent is near its threshold but below
    near       [capacity]           fp32           JumpReLU: 1 / bandwidth where near, else 0
    active     [n]                  int32          JumpReLU: latents that fire on the token

The level of a batch is found exactly without sorting it. Take the 2 k-th largest maximum of each token: half of the
tokens hold 2 k values above the median of these, so all hold n * k, and the level is not below it. Only chunks whose
maximum reaches that bound are read again; a histogram of their values, some bits at a time, gives the level and how
many equal to it still have room. Nothing waits for the host. Where JumpReLU has more entries than the capacity, the
last tokens lose theirs and `offsets` stops at the capacity: the caller looks. Oracles: `reference.batch_topk`,
`reference.jump`.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.keys import kth_largest, ordered
from sae_kernels.select import check_maxima, warps_for
from sae_kernels.values import Entries

BINS = 2**15  # of a histogram of the upper halves of positive keys
LOW_BINS = 2**16  # of one of lower halves
COPIES = 8  # of a histogram, since most values want to be counted in few bins
AT_ONCE = 1024  # values, in whole chunks, that a program reads at once
GROUP = 2**13  # tokens of which one program takes the median


@triton.jit
def _peaks_kernel(maxima_ptr, peaks_ptr, n_chunks, k, CHUNKS: tl.constexpr, SHIFT: tl.constexpr):
    # grid (n,): program n writes the k-th largest maximum of its token
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS)
    key = ordered(tl.load(maxima_ptr + n * n_chunks + c, mask=c < n_chunks, other=float("-inf")), SHIFT)
    low = tl.min(tl.where(c < n_chunks, key, 2147483647))
    tl.store(peaks_ptr + n, kth_largest(key, k, low, tl.max(key)) << SHIFT)


@triton.jit
def _bound_kernel(peaks_ptr, bound_ptr, n, GROUP: tl.constexpr):
    # grid (groups of tokens,): the least of the groups' medians; at least half of a group reach its median
    i = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    key = tl.load(peaks_ptr + i, mask=i < n, other=-2147483648)
    size = tl.minimum(n - tl.program_id(0) * GROUP, GROUP)
    low = tl.min(tl.where(i < n, key, 2147483647))
    tl.atomic_min(bound_ptr, kth_largest(key, (size + 1) // 2, low, tl.max(key)))


@triton.jit
def _level_kernel(
    histogram_ptr, level_ptr, wanted, SHIFT: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # grid (1,): level[0] the key that the `wanted` largest reach, level[1] how many of those that equal it.
    # SHIFT 16 finds its upper half; then SHIFT 0 the lower, of what level[1] still wants below that
    remaining = wanted
    if SHIFT == 0:
        remaining = tl.load(level_ptr + 1)
    above, found, left = 0, -1, 0
    for step in range(BINS // BLOCK):
        bin = BINS - 1 - (step * BLOCK + tl.arange(0, BLOCK))  # from the largest down
        count = tl.zeros((BLOCK,), tl.int32)
        for copy in tl.static_range(COPIES):
            count += tl.load(histogram_ptr + copy * BINS + bin)
        upto = above + tl.cumsum(count, 0)
        here = (upto >= remaining) & (upto - count < remaining)
        found = tl.maximum(found, tl.max(tl.where(here, bin, -1)))
        left += tl.sum(tl.where(here, remaining - (upto - count), 0))
        above += tl.sum(count)
    # fewer positive keys than wanted: all of them
    upper = 0
    if SHIFT == 0:
        upper = tl.load(level_ptr)
    tl.store(level_ptr, upper + (tl.maximum(found, 0) << SHIFT))
    tl.store(level_ptr + 1, left)


@triton.jit
def _chunks_kernel(
    maxima_ptr, bound_ptr, floor_ptr, chunk_ptr, count_ptr, n_chunks, CHUNKS: tl.constexpr, JUMP: tl.constexpr
):
    # grid (n,): program n lists the chunks of its token that hold something of interest
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS)
    maxima = tl.load(maxima_ptr + n * n_chunks + c, mask=c < n_chunks, other=float("-inf")).to(tl.float32)
    if JUMP:
        chosen = (c < n_chunks) & (maxima > tl.load(floor_ptr + c, mask=c < n_chunks, other=float("inf")))
    else:
        chosen = ordered(maxima, 0) >= tl.maximum(tl.load(bound_ptr), 1)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(chunk_ptr + n * n_chunks + place, c, mask=chosen)
    tl.store(count_ptr + n, tl.sum(chosen.to(tl.int32)))


@triton.jit
def _candidates(
    pre_ptr, chunk_ptr, n, at, count, n_latents, padded, n_chunks, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Pre-activations of AT_ONCE listed chunks from the at-th on, a row a chunk; their latents; which are real."""
    j = at + tl.arange(0, AT_ONCE)
    chunk = tl.load(chunk_ptr + n * n_chunks + j, mask=j < count, other=0)
    latent = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    real = (j < count)[:, None] & (latent < n_latents)
    pre = tl.load(pre_ptr + n * padded + latent, mask=real, other=float("-inf")).to(tl.float32)
    return pre, latent, real


@triton.jit
def _count(chosen):
    return tl.sum(tl.sum(chosen.to(tl.int32), 1))


@triton.jit
def _ranks(chosen):
    """How many of the chosen entries stand before each entry, in the order of its rows: ranks, and their number."""
    flags = chosen.to(tl.int32)
    in_row = tl.sum(flags, 1)
    before = tl.cumsum(in_row, 0) - in_row
    return before[:, None] + tl.cumsum(flags, 1) - flags, tl.sum(in_row)


@triton.jit
def _histogram_kernel(
    pre_ptr, chunk_ptr, count_ptr, bound_ptr, level_ptr, histogram_ptr, n_latents, padded, n_chunks,
    CHUNK: tl.constexpr, AT_ONCE: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    # grid (n,): program n counts the values of its token by their bits from SHIFT on, in one of the copies
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + n)
    histogram_ptr += n % COPIES * BINS
    for at in range(0, count, AT_ONCE):
        pre, _, real = _candidates(pre_ptr, chunk_ptr, n, at, count, n_latents, padded, n_chunks, CHUNK, AT_ONCE)
        key = ordered(pre, 0)
        if SHIFT == 16:
            counted = real & (key >= tl.maximum(tl.load(bound_ptr), 1))
            bin = key >> 16
        else:
            counted = real & (key > 0) & ((key >> 16) == (tl.load(level_ptr) >> 16))
            bin = key & 0xFFFF
        tl.atomic_add(histogram_ptr + bin, 1, mask=counted, sem="relaxed")


@triton.jit
def _count_kernel(
    pre_ptr, chunk_ptr, count_ptr, level_ptr, theta_ptr, above_ptr, second_ptr, half, n_latents, padded, n_chunks,
    CHUNK: tl.constexpr, AT_ONCE: tl.constexpr, JUMP: tl.constexpr,
):  # fmt: skip
    # grid (n,): program n counts the entries of its token: above the level, and equal to it;
    # JUMP: that fire or are near, and that fire
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + n)
    above, second = 0, 0
    for at in range(0, count, AT_ONCE):
        pre, latent, real = _candidates(pre_ptr, chunk_ptr, n, at, count, n_latents, padded, n_chunks, CHUNK, AT_ONCE)
        if JUMP:
            theta = tl.load(theta_ptr + latent, mask=real, other=float("inf"))
            above += _count(real & ((pre > theta) | (tl.abs(pre - theta) < half)))
            second += _count(real & (pre > theta))
        else:
            key, level = ordered(pre, 0), tl.load(level_ptr)
            above += _count(real & (key > level))
            second += _count(real & (key == level))
    tl.store(above_ptr + n, above)
    tl.store(second_ptr + n, second)


@triton.jit
def _offsets_kernel(above_ptr, equal_ptr, level_ptr, offsets_ptr, n, capacity, BLOCK: tl.constexpr, TIES: tl.constexpr):
    # grid (1,): offsets from the counts, the first being there; TIES: of those equal to the level, the first level[1]
    first, equal_before = tl.load(offsets_ptr), 0
    for at in range(0, n, BLOCK):
        i = at + tl.arange(0, BLOCK)
        taken = tl.load(above_ptr + i, mask=i < n, other=0)
        if TIES:
            equal = tl.load(equal_ptr + i, mask=i < n, other=0)
            before = equal_before + tl.cumsum(equal, 0) - equal
            taken += tl.minimum(tl.maximum(tl.load(level_ptr + 1) - before, 0), equal)
            equal_before += tl.sum(equal)
        tl.store(offsets_ptr + 1 + i, tl.minimum(first + tl.cumsum(taken, 0), capacity), mask=i < n)
        first += tl.sum(taken)


@triton.jit
def _fill_kernel(
    pre_ptr, chunk_ptr, count_ptr, level_ptr, theta_ptr, above_ptr, offsets_ptr, acts_ptr, idx_ptr, near_ptr, half,
    n_latents, padded, n_chunks, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr, JUMP: tl.constexpr,
):  # fmt: skip
    # grid (n,): program n writes the entries of its token
    n = tl.program_id(0).to(tl.int64)
    count, at_entry, stop = tl.load(count_ptr + n), tl.load(offsets_ptr + n), tl.load(offsets_ptr + n + 1)
    # of those equal to the level the token takes what its range has room for beyond those above it
    room = stop - at_entry - tl.load(above_ptr + n)
    for at in range(0, count, AT_ONCE):
        pre, latent, real = _candidates(pre_ptr, chunk_ptr, n, at, count, n_latents, padded, n_chunks, CHUNK, AT_ONCE)
        if JUMP:
            theta = tl.load(theta_ptr + latent, mask=real, other=float("inf"))
            near = tl.abs(pre - theta) < half
            chosen = real & ((pre > theta) | near)
        else:
            key, level = ordered(pre, 0), tl.load(level_ptr)
            equal = real & (key == level)
            chosen = real & (key > level)
            n_equal = _count(equal)
            if n_equal > 0:  # seldom, and ranks are most of this loop
                rank, _ = _ranks(equal)
                chosen = chosen | (equal & (rank < room))
            room -= n_equal
        rank, n_chosen = _ranks(chosen)
        e = at_entry + rank
        inside = chosen & (e < stop)
        tl.store(idx_ptr + e, latent, mask=inside)
        if JUMP:
            tl.store(acts_ptr + e, tl.where(pre > theta, pre, 0.0), mask=inside)
            tl.store(near_ptr + e, tl.where(near, 0.5 / half, 0.0), mask=inside)
        else:
            tl.store(acts_ptr + e, pre, mask=inside)
        at_entry += n_chosen


def _listed(maxima: Tensor, *, bound: Tensor | None = None, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The chunks of each token that are to be read, [n, n_chunks], and their number [n]."""
    n, n_chunks = maxima.shape
    chunk = torch.empty(n, n_chunks, dtype=torch.int32, device=maxima.device)
    count = torch.empty(n, dtype=torch.int32, device=maxima.device)
    chunks = triton.next_power_of_2(n_chunks)
    _chunks_kernel[(n,)](
        maxima, bound, floor, chunk, count, n_chunks, CHUNKS=chunks, JUMP=floor is not None,
        num_warps=warps_for(chunks),
    )  # fmt: skip
    return chunk, count


def new_entries(n: int, capacity: int, n_latents: int, device: torch.device, *, jumping: bool = True) -> Entries:
    """Room for the entries of n tokens, without any yet."""
    offsets = torch.zeros(n + 1, dtype=torch.int32, device=device)
    idx = torch.full((capacity,), n_latents, dtype=torch.int32, device=device)
    acts = torch.zeros(capacity, dtype=torch.float32, device=device)
    if not jumping:
        return Entries(acts, idx, offsets)
    return Entries(acts, idx, offsets, torch.zeros_like(acts), torch.zeros_like(offsets[1:]))


def batch_topk(
    pre: Tensor, maxima: Tensor, n_latents: int, k: int, *, total: Callable[[Tensor], Tensor] | None = None,
    before: Callable[[Tensor], Tensor] | None = None,
) -> Entries:  # fmt: skip
    """The n * k largest positive pre-activations of the batch.

    Where ranks share the latents, ``total`` sums counts over them, ``before`` over the ranks that come before this one:
    of equal ones those of the first rank are taken.
    """
    chunk_size = check_maxima(pre, maxima)
    n, n_chunks = maxima.shape
    bf16, bounded = pre.dtype == torch.bfloat16, 2 * k <= n_chunks
    bound = _bound(maxima, k, bf16) if bounded else torch.zeros(1, dtype=torch.int32, device=pre.device)
    level = torch.zeros(2, dtype=torch.int32, device=pre.device)
    chunk, count = _listed(maxima, bound=bound)
    read = (pre, chunk, count)
    size, tile = (
        (n_latents, pre.shape[1], n_chunks),
        {"CHUNK": chunk_size, "AT_ONCE": AT_ONCE // chunk_size, "num_warps": 2},
    )
    for shift, bins, copies in ((16, BINS, COPIES),) if bf16 else ((16, BINS, COPIES), (0, LOW_BINS, 1)):
        histogram = torch.zeros(copies, bins, dtype=torch.int32, device=pre.device)
        shape = {"SHIFT": shift, "BINS": bins, "COPIES": copies}
        _histogram_kernel[(n,)](*read, bound, level, histogram, *size, **shape, **tile)
        _level_kernel[(1,)](
            histogram if total is None else total(histogram), level, n * k, **shape, BLOCK=4096, num_warps=8
        )
    above, equal = torch.empty(2, n, dtype=torch.int32, device=pre.device)
    _count_kernel[(n,)](*read, level, None, above, equal, 0.0, *size, JUMP=False, **tile)
    if before is not None:  # the room that is left by others; below 0 there is none
        level[1:] -= before(equal.sum(dtype=torch.int32)[None])
    found = new_entries(n, n * k, n_latents, pre.device, jumping=False)
    _offsets_kernel[(1,)](above, equal, level, found.offsets, n, n * k, BLOCK=4096, TIES=True, num_warps=8)
    _fill_kernel[(n,)](
        *read, level, None, above, found.offsets, found.acts, found.idx, None, 0.0, *size, JUMP=False, **tile
    )
    return found


def _bound(maxima: Tensor, k: int, bf16: bool) -> Tensor:
    """A key that n * k of the values reach: [1] int32."""
    n, n_chunks = maxima.shape
    peaks = torch.empty(n, dtype=torch.int32, device=maxima.device)
    bound = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=maxima.device)
    chunks = triton.next_power_of_2(n_chunks)
    warps = warps_for(chunks)
    _peaks_kernel[(n,)](maxima, peaks, n_chunks, 2 * k, CHUNKS=chunks, SHIFT=16 if bf16 else 0, num_warps=warps)
    group = min(GROUP, triton.next_power_of_2(n))
    _bound_kernel[(triton.cdiv(n, group),)](peaks, bound, n, GROUP=group, num_warps=8)
    return bound


def jump(pre: Tensor, maxima: Tensor, threshold: Tensor, bandwidth: float, entries: Entries, *, first: int = 0) -> None:
    """Add what fires or is near its threshold [n_latents] fp32 to ``entries``.

    ``pre`` are those of tokens ``first`` and following, and the tokens before have been added.
    """
    chunk_size = check_maxima(pre, maxima)
    (n, n_chunks), n_latents = maxima.shape, len(threshold)
    if threshold.dtype != torch.float32:
        raise ValueError(f"threshold must be fp32 [n_latents], got {threshold.dtype} {list(threshold.shape)}")
    if entries.near is None or entries.active is None or first + n >= len(entries.offsets):
        raise ValueError(f"entries must be new_entries of at least {first + n} tokens, got {len(entries.offsets) - 1}")
    half = bandwidth / 2
    reach = torch.nn.functional.pad(threshold - half, (0, pre.shape[1] - n_latents), value=torch.inf)
    floor = reach.view(n_chunks, chunk_size).amin(dim=1)
    # a little lower than any entry that counts, however the comparison in the kernel rounds
    chunk, count = _listed(maxima, floor=floor - 1e-6 * floor.abs().clamp(min=half))
    read = (pre, chunk, count)
    size, tile = (
        (n_latents, pre.shape[1], n_chunks),
        {"CHUNK": chunk_size, "AT_ONCE": AT_ONCE // chunk_size, "num_warps": 2},
    )
    above = torch.empty(n, dtype=torch.int32, device=pre.device)
    offsets, active = entries.offsets[first:], entries.active[first : first + n]
    _count_kernel[(n,)](*read, None, threshold, above, active, half, *size, JUMP=True, **tile)
    _offsets_kernel[(1,)](above, None, None, offsets, n, len(entries.acts), BLOCK=4096, TIES=False, num_warps=8)
    _fill_kernel[(n,)](
        *read, None, threshold, above, offsets, entries.acts, entries.idx, entries.near, half, *size, JUMP=True, **tile
    )
