"""Decode, and everything that follows from it for a token: the error, the loss, the gradients of the activations.

    error[p, i, :]  = b_dec - x[i, :] + sum of acts[e] * row[idx[e], :]  over entries e of token i, idx[e] < prefix[p]
    row[l, :]       = w_dec[l, :] * inverse_norm[l]
    squares[i]      = mean over p of |error[p, i, :]|^2
    whole[i]        = |error[P - 1, i, :]|^2
    pull[g, i, :]   = 1/P * sum of error[p, i, :] over p >= g       with P > 1 of errors rounded to the dtype of pull
    d_acts[e]       = scale * pull[g, i, :] . row[idx[e], :]        g the first prefix that holds idx[e]

    acts      [capacity]       fp32           entries of one token stand together, by ascending idx
    idx       [capacity]       int32          0 <= idx < n_latents: not checked
    offsets   [n + 1]          int32          token i owns entries offsets[i] to offsets[i + 1] <= capacity
    w_dec     [n_latents, d]   fp32 | bf16
    inverse_norm [n_latents]   fp32           scales the rows of w_dec to norm 1
    x         [n, d]           as w_dec
    b_dec     [d]              fp32
    prefixes  P sizes, rising, the last n_latents; P = 1: no Matryoshka
    pull      [P, n, d]        as w_dec
    token     [capacity]       int32          written for the entries that are
    squares, whole   [blocks, n]        fp32  a part for each block of columns: their sums over blocks are meant
    d_acts           [blocks, capacity] fp32  likewise; also where acts is 0

Where latents are shared by ranks, the rebuilt parts are added up over them in between: `group_sums` gives a rank's

    sums[g, i, :]   = sum of acts[e] * row[idx[e], :]  over entries e of token i whose first prefix is g

and `decode_error` takes their sum over ranks, [P, n, d] fp32, in place of its own. Prefixes are then those of the rank:
0 where it begins behind one, and the last is no less than its n_latents.

`pull` is what an entry's decoder row is moved by: the gradient of w_dec[l] is scale * sum of acts * pull. A program
takes one block of columns of one token, so that what it read of w_dec is still in the nearest cache when it is wanted
a second time. Oracles: `reference.decode_error`, `reference.group_sums`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _range_sum(
    acts_ptr, idx_ptr, w_ptr, inverse_norm_ptr, start, stop, d, column, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr
):
    """Sum of act * row of w_dec over entries start to stop."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    none = tl.zeros((BLOCK_D,), tl.int32)  # makes masks blocks: the interpreter turns a lone bool into an integer
    for first in range(start, stop, UNROLL):
        # one entry after the other, unrolled: their loads are all on the way before the first is used
        for u in tl.static_range(UNROLL):
            e = first + u
            latent = tl.load(idx_ptr + e, mask=e < stop, other=0).to(tl.int64)
            act = tl.load(acts_ptr + e, mask=e < stop, other=0.0) * tl.load(inverse_norm_ptr + latent)
            w = tl.load(w_ptr + latent * d + column, mask=(none + e < stop) & (column < d), other=0.0)
            total += w.to(tl.float32) * act
    return total


@triton.jit
def _acts_grads(
    idx_ptr, w_ptr, inverse_norm_ptr, token_ptr, d_acts_ptr, pull, n, start, stop, scale, d, column,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Write d_acts, and with the first block of columns token, of entries start to stop."""
    for first in range(start, stop, UNROLL):
        e = first + tl.arange(0, UNROLL)
        latent = tl.load(idx_ptr + e, mask=e < stop, other=0).to(tl.int64)
        mask = (e < stop)[:, None] & (column < d)[None, :]
        w = tl.load(w_ptr + latent[:, None] * d + column[None, :], mask=mask, other=0.0)
        grad = tl.sum(w.to(tl.float32) * pull[None, :], 1) * tl.load(inverse_norm_ptr + latent)
        tl.store(d_acts_ptr + e, grad * scale, mask=e < stop)
        if tl.program_id(1) == 0:
            tl.store(token_ptr + e, tl.zeros((UNROLL,), tl.int32) + n.to(tl.int32), mask=e < stop)


@triton.jit
def _group_sums_kernel(
    acts_ptr, idx_ptr, offsets_ptr, bounds_ptr, w_ptr, inverse_norm_ptr, sums_ptr, n_tokens, d, P: tl.constexpr,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # grid (n, blocks of columns): program (n, c) writes block c of sums[:, n, :]
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    plane = tl.cast(n_tokens, tl.int64) * d
    first = tl.load(offsets_ptr + n)
    for p in tl.static_range(P):
        end = tl.load(bounds_ptr + n * P + p)
        total = _range_sum(acts_ptr, idx_ptr, w_ptr, inverse_norm_ptr, first, end, d, column, BLOCK_D, UNROLL)
        tl.store(sums_ptr + p * plane + n * d + column, total, mask=column < d)
        first = end


@triton.jit
def _decode_error_kernel(
    acts_ptr, idx_ptr, offsets_ptr, w_ptr, inverse_norm_ptr, x_ptr, b_ptr, sums_ptr, pull_ptr, token_ptr, d_acts_ptr,
    squares_ptr, whole_ptr, scale, capacity, d, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    # grid (n, blocks of columns): program (n, c) writes block c of pull[0, n, :], its part of squares, whole, d_acts
    n = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(offsets_ptr + n), tl.load(offsets_ptr + n + 1)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    d_acts_ptr += tl.program_id(1).to(tl.int64) * capacity
    error = tl.load(b_ptr + column, mask=inside, other=0.0)
    error -= tl.load(x_ptr + n * d + column, mask=inside, other=0.0).to(tl.float32)
    if SUMMED:
        error += tl.load(sums_ptr + n * d + column, mask=inside, other=0.0)
    else:
        error += _range_sum(acts_ptr, idx_ptr, w_ptr, inverse_norm_ptr, start, stop, d, column, BLOCK_D, UNROLL)
    tl.store(pull_ptr + n * d + column, error, mask=inside)
    squares = tl.sum(error * error)
    part = tl.program_id(1) * tl.num_programs(0) + n
    tl.store(squares_ptr + part, squares)
    tl.store(whole_ptr + part, squares)
    _acts_grads(
        idx_ptr, w_ptr, inverse_norm_ptr, token_ptr, d_acts_ptr, error, n, start, stop, scale, d, column, UNROLL
    )


@triton.jit
def _bounds_kernel(idx_ptr, offsets_ptr, prefix_ptr, bounds_ptr, P: tl.constexpr, WIDTH: tl.constexpr):
    # grid (n,): program n writes bounds[n, :], where the entries of token n in each prefix end
    n = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(offsets_ptr + n), tl.load(offsets_ptr + n + 1)
    for p in tl.static_range(P):
        size = tl.load(prefix_ptr + p)
        end = start
        for at in range(start, stop, WIDTH):
            e = at + tl.arange(0, WIDTH)
            idx = tl.load(idx_ptr + e, mask=e < stop, other=2147483647)
            end += tl.sum((idx < size).to(tl.int32))
        tl.store(bounds_ptr + n * P + p, end)


@triton.jit
def _decode_prefixes_kernel(
    acts_ptr, idx_ptr, offsets_ptr, bounds_ptr, w_ptr, inverse_norm_ptr, x_ptr, b_ptr, sums_ptr, pull_ptr, token_ptr,
    d_acts_ptr, squares_ptr, whole_ptr, scale, capacity, n_tokens, d, P: tl.constexpr, BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    # grid (n, blocks of columns): program (n, c) writes block c of pull[:, n, :], its part of squares, whole, d_acts
    n = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + n)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    d_acts_ptr += tl.program_id(1).to(tl.int64) * capacity
    plane = tl.cast(n_tokens, tl.int64) * d
    here = pull_ptr + n * d + column
    error = tl.load(b_ptr + column, mask=inside, other=0.0)
    error -= tl.load(x_ptr + n * d + column, mask=inside, other=0.0).to(tl.float32)
    total, whole = 0.0, 0.0
    first = start
    for p in tl.static_range(P):
        end = tl.load(bounds_ptr + n * P + p)
        if SUMMED:
            error += tl.load(sums_ptr + p * plane + n * d + column, mask=inside, other=0.0)
        else:
            error += _range_sum(acts_ptr, idx_ptr, w_ptr, inverse_norm_ptr, first, end, d, column, BLOCK_D, UNROLL)
        first = end
        whole = tl.sum(error * error)
        total += whole
        # each thread reads back below what it wrote here
        tl.store(here + p * plane, error, mask=inside)
    part = tl.program_id(1) * tl.num_programs(0) + n
    tl.store(squares_ptr + part, total / P)
    tl.store(whole_ptr + part, whole)
    pull = tl.zeros((BLOCK_D,), tl.float32)
    for q in tl.static_range(P):
        p = P - 1 - q
        pull += tl.load(here + p * plane, mask=inside, other=0.0).to(tl.float32) / P
        tl.store(here + p * plane, pull, mask=inside)
        begin = start
        if p > 0:
            begin = tl.load(bounds_ptr + n * P + p - 1)
        end = tl.load(bounds_ptr + n * P + p)
        _acts_grads(
            idx_ptr, w_ptr, inverse_norm_ptr, token_ptr, d_acts_ptr, pull, n, begin, end, scale, d, column, UNROLL
        )


def columns_for(d: int) -> int:
    """Columns that one program takes: few, so that many programs are at work on rows that many tokens share."""
    return min(256, triton.next_power_of_2(d))


def _sizes(columns: int) -> dict[str, int]:
    return {"BLOCK_D": columns, "UNROLL": 4, "num_warps": max(1, columns // 256)}


def _bounds(idx: Tensor, offsets: Tensor, prefixes: Tensor) -> Tensor:
    """Where the entries of each token in each prefix end: [n, P]."""
    n = len(offsets) - 1
    bounds = torch.empty(n, len(prefixes), dtype=torch.int32, device=idx.device)
    _bounds_kernel[(n,)](idx, offsets, prefixes, bounds, P=len(prefixes), WIDTH=32, num_warps=1)
    return bounds


def group_sums(
    acts: Tensor, idx: Tensor, offsets: Tensor, w_dec: Tensor, inverse_norm: Tensor, *, sums: Tensor,
    prefixes: Tensor | None = None, columns: int | None = None,
) -> None:  # fmt: skip
    """Fill ``sums`` [P, n, d] fp32; the rest as for `decode_error`."""
    n, d, n_prefixes = len(offsets) - 1, w_dec.shape[1], 1 if prefixes is None else len(prefixes)
    if sums.shape != (n_prefixes, n, d) or sums.dtype != torch.float32:
        raise ValueError(f"sums must be fp32 [{n_prefixes}, {n}, {d}], got {sums.dtype} {list(sums.shape)}")
    if any(t.dtype != torch.int32 for t in (idx, offsets)):
        raise ValueError(f"idx and offsets must be int32, got {idx.dtype} and {offsets.dtype}")
    columns = columns or columns_for(d)
    bounds = offsets[1:] if prefixes is None else _bounds(idx, offsets, prefixes)
    _group_sums_kernel[(n, triton.cdiv(d, columns))](
        acts, idx, offsets, bounds, w_dec, inverse_norm, sums, n, d, P=n_prefixes, **_sizes(columns)
    )


def decode_error(
    acts: Tensor, idx: Tensor, offsets: Tensor, w_dec: Tensor, inverse_norm: Tensor, x: Tensor, b_dec: Tensor,
    scale: float, *, pull: Tensor, token: Tensor, d_acts: Tensor, squares: Tensor, whole: Tensor,
    prefixes: Tensor | None = None, sums: Tensor | None = None, columns: int | None = None,
) -> None:  # fmt: skip
    """Fill ``pull``, ``token``, ``d_acts``, ``squares`` and ``whole``.

    prefixes   [P] int32; None for one
    sums       [P, n, d] fp32, the `group_sums` of all ranks; None: these entries are all
    columns    of a block; None: `columns_for`
    """
    (n, d), capacity = x.shape, len(acts)
    n_prefixes = 1 if prefixes is None else len(prefixes)
    columns = columns or columns_for(d)
    blocks = triton.cdiv(d, columns)
    if w_dec.dtype != x.dtype or w_dec.shape[1] != d or pull.shape != (n_prefixes, n, d) or pull.dtype != x.dtype:
        wanted = f"{x.dtype} [n_latents, {d}] and [{n_prefixes}, {n}, {d}]"
        raise ValueError(f"w_dec and pull must be {wanted}, got {list(w_dec.shape)} and {list(pull.shape)}")
    if any(t.dtype != torch.int32 for t in (idx, offsets, token)):
        raise ValueError(f"idx, offsets and token must be int32, got {idx.dtype}, {offsets.dtype}, {token.dtype}")
    if d_acts.shape != (blocks, capacity) or squares.shape != (blocks, n) or whole.shape != (blocks, n):
        raise ValueError(f"d_acts, squares and whole must be of {blocks} blocks of columns, got {list(d_acts.shape)}")
    if sums is not None and (sums.shape != pull.shape or sums.dtype != torch.float32):
        raise ValueError(f"sums must be fp32 {list(pull.shape)} like pull, got {sums.dtype} {list(sums.shape)}")
    constants = {**_sizes(columns), "SUMMED": sums is not None}
    outs = (sums, pull, token, d_acts, squares, whole, scale, capacity)
    if prefixes is None:
        _decode_error_kernel[(n, blocks)](acts, idx, offsets, w_dec, inverse_norm, x, b_dec, *outs, d, **constants)
        return
    bounds = _bounds(idx, offsets, prefixes)
    _decode_prefixes_kernel[(n, blocks)](
        acts, idx, offsets, bounds, w_dec, inverse_norm, x, b_dec, *outs, n, d, P=n_prefixes, **constants
    )
