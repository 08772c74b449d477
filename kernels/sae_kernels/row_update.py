"""Row update: Adam on one weight matrix, the gradient of a row summed from its latent's list on the way.

    encoder   g[l, :] = sum of d_acts[e] * rows[token[e], :]       over entries e of latent l with acts[e] > 0
    decoder   g[l, :] = scale * sum of acts[e] * rows[p, token[e], :]      p the first prefix that holds l,
              less its part along the row: w * sum of acts[e] * d_acts[e]
    both      + AUX * aux.rows[slot[l], :] where slot[l] >= 0;  * FACTOR;  m, v, w as torch.optim.Adam

    rows      [n, d] or [P, n, d]       fp32 | bf16    the batch, or `pull` of `decode_error`
    high      [n_latents, d]            fp32 | bf16    the weight, or its upper half (`split`)
    low       None or [n_latents, d]    int16          the lower half; None with fp32
    m, v      [n_latents, d]            fp32 | bf16    bf16 is rounded stochastically: to nearest, v would stand still
    inverse_norm   decoder: [n_latents] fp32           the row is high, low times this, so that its norm is 1
    fp8, fp8_scale, fp8_next   encoder: e4m3 copy of the row over fp8_scale, and the scale of the next one
    scalars   [9]                       fp32           places in `scalars`; FACTOR 0 leaves everything as it is

A program updates one block of columns of one row: nothing in it depends on another block, so the kernel streams like
an elementwise one. What does is taken up a step later: the norm of the new row becomes its inverse_norm, and the
largest of its values the next fp8 scale, with an eighth of room. No gradient is ever stored and no float added
atomically; lists are summed in order, so every run gives the same bits. Whole blocks of 128 entries that belong to one
latent are summed beforehand (`block_sums`), so that a latent that fires everywhere does not hold up the rest. What
belongs to a latent as a whole is updated in the encoder's pass: b_enc, the threshold, and the tokens since it fired.
Oracle: `reference.row_update`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.adam import adam, stochastic_bits, store_moment
from sae_kernels.prepare import FP8_MAX, TINY
from sae_kernels.scalars import AUX, COUNT, FACTOR
from sae_kernels.split import halves, joined
from sae_kernels.values import BLOCK, FP8_HEADROOM, AuxGrads, Latents, PackedLists, Rows

FP8_ROOM = tl.constexpr(FP8_HEADROOM)


@dataclass(frozen=True)
class Shape:
    """Columns that a program updates, its warps, and the entries of a list that it has on the way at once."""

    columns: int
    warps: int
    unroll: int = 4


@triton.jit
def _load_weight(high_ptr, low_ptr, at, mask, SPLIT: tl.constexpr):
    w = tl.load(high_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
    if SPLIT:
        w = joined(w, tl.load(low_ptr + at, mask=mask, other=0, eviction_policy="evict_first"))
    return w


@triton.jit
def _store_weight(high_ptr, low_ptr, at, w, mask, SPLIT: tl.constexpr):
    if SPLIT:
        w, low = halves(w)
        tl.store(low_ptr + at, low, mask=mask, eviction_policy="evict_first")
    tl.store(high_ptr + at, w.to(high_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _list_sums(
    token_ptr, acts_ptr, d_acts_ptr, near_ptr, rows_ptr, start, stop, cut, gap, theta, count_grad, d, column, inside,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, ENCODER: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Sums over entries start to stop, of which those from cut on stand gap further on.

    Of the rows; of the gradient of b_enc (encoder) or the part along the row (decoder); of that of theta; of firings.
    """
    total = tl.zeros((BLOCK_D,), tl.float32)
    none = tl.zeros((BLOCK_D,), tl.int32)  # makes masks blocks: the interpreter turns a lone bool into an integer
    along, d_theta, fired = 0.0, 0.0, 0
    for first in range(start, stop - gap, UNROLL):
        # one entry after the other, unrolled: their loads are all on the way before the first is used
        for u in tl.static_range(UNROLL):
            q = first + u
            real = q < stop - gap
            p = tl.where(q >= cut, q + gap, q)
            token = tl.load(token_ptr + p, mask=real, other=0).to(tl.int64)
            act = tl.load(acts_ptr + p, mask=real, other=0.0)
            d_act = tl.load(d_acts_ptr + p, mask=real, other=0.0)
            if ENCODER:
                weight = tl.where(act > 0, d_act, 0.0)
                along += weight
                fired += (act > 0).to(tl.int32)
                if THRESHOLD:
                    d_theta -= tl.load(near_ptr + p, mask=real, other=0.0) * (theta * d_act + count_grad)
            else:
                weight = act
                along += act * d_act
            x = tl.load(rows_ptr + token * d + column, mask=inside & (none + q < stop - gap), other=0.0)
            total += x.to(tl.float32) * weight
    return total, along, d_theta, fired


@triton.jit
def _plane(rows_ptr, prefix_ptr, latent, n_tokens, d, P: tl.constexpr):
    """Where the rows begin that latent l is moved by: those of the first prefix that holds it."""
    for p in tl.static_range(P - 1):
        rows_ptr += tl.where(latent >= tl.load(prefix_ptr + p), 1, 0).to(tl.int64) * n_tokens * d
    return rows_ptr


@triton.jit
def _block_sums_kernel(
    latent_ptr, token_ptr, acts_ptr, d_acts_ptr, near_ptr, x_ptr, pull_ptr, prefix_ptr, theta_ptr, scalars_ptr,
    sums_ptr, extras_ptr, n_latents, n_tokens, d, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, THRESHOLD: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    # grid (blocks of entries, blocks of columns, 2): a program whose block is one latent's writes its part of
    # sums[0], the encoder's, or of sums[1], the decoder's
    block = tl.program_id(0)
    start = block * BLOCK
    latent = tl.load(latent_ptr + start)
    if (latent == tl.load(latent_ptr + start + BLOCK - 1)) & (latent < n_latents):
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        row = (tl.program_id(2) * tl.num_programs(0) + block).to(tl.int64)
        theta = 0.0
        if THRESHOLD:
            theta = tl.load(theta_ptr + latent)
        count_grad = tl.load(scalars_ptr + COUNT)
        if tl.program_id(2) == 0:
            total, along, d_theta, fired = _list_sums(
                token_ptr, acts_ptr, d_acts_ptr, near_ptr, x_ptr, start, start + BLOCK, start + BLOCK, 0, theta,
                count_grad, d, column, column < d, BLOCK_D, 32, True, THRESHOLD,
            )  # fmt: skip
        else:
            plane = _plane(pull_ptr, prefix_ptr, latent, n_tokens, d, P)
            total, along, d_theta, fired = _list_sums(
                token_ptr, acts_ptr, d_acts_ptr, near_ptr, plane, start, start + BLOCK, start + BLOCK, 0, theta,
                count_grad, d, column, column < d, BLOCK_D, 32, False, THRESHOLD,
            )  # fmt: skip
        tl.store(sums_ptr + row * d + column, total, mask=column < d)
        if tl.program_id(1) == 0:
            tl.store(extras_ptr + row * 3, along)
            tl.store(extras_ptr + row * 3 + 1, d_theta)
            tl.store(extras_ptr + row * 3 + 2, tl.zeros((), tl.float32) + fired)


@triton.jit
def _update_latent(
    b_ptr, b_m_ptr, b_v_ptr, theta_ptr, theta_m_ptr, theta_v_ptr, silent_ptr, scalars_ptr, latent, n_tokens, d_b,
    d_theta, fired, theta_faster, THRESHOLD: tl.constexpr,
):  # fmt: skip
    b, m, v = tl.load(b_ptr + latent), tl.load(b_m_ptr + latent), tl.load(b_v_ptr + latent)
    b, m, v = adam(b, m, v, d_b, scalars_ptr, 1.0, True)
    tl.store(b_ptr + latent, b)
    tl.store(b_m_ptr + latent, m)
    tl.store(b_v_ptr + latent, v)
    if THRESHOLD:
        theta, m, v = tl.load(theta_ptr + latent), tl.load(theta_m_ptr + latent), tl.load(theta_v_ptr + latent)
        theta, m, v = adam(theta, m, v, d_theta, scalars_ptr, theta_faster, True)
        tl.store(theta_ptr + latent, tl.maximum(theta, 0.0))
        tl.store(theta_m_ptr + latent, m)
        tl.store(theta_v_ptr + latent, v)
    silent = tl.load(silent_ptr + latent) + n_tokens
    tl.store(silent_ptr + latent, tl.where(fired > 0, 0, silent))


@triton.jit
def _row_update_kernel(
    high_ptr, low_ptr, m_ptr, v_ptr, inverse_norm_ptr, fp8_ptr, fp8_next_ptr, b_ptr, b_m_ptr, b_v_ptr, theta_ptr,
    theta_m_ptr, theta_v_ptr, silent_ptr, offsets_ptr, token_ptr, acts_ptr, d_acts_ptr, near_ptr, rows_ptr, prefix_ptr,
    sums_ptr, extras_ptr, aux_ptr, aux_along_ptr, slot_ptr, parts_ptr, scalars_ptr, scale, theta_faster, n_tokens, d,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr, ENCODER: tl.constexpr, THRESHOLD: tl.constexpr,
    P: tl.constexpr, AUXK: tl.constexpr, SPLIT: tl.constexpr, ROUND: tl.constexpr, FP8: tl.constexpr,
    UPDATE: tl.constexpr,
):  # fmt: skip
    # grid (n_latents, blocks of columns): program (l, c) updates block c of row l, and with block 0 what l has one of;
    # parts[l, c] is left the sum of squares of the new row's block (encoder with FP8: its largest), and without UPDATE
    # nothing but that of the gradient. Programs of one block of columns run together: their rows fit into the cache
    factor = tl.load(scalars_ptr + FACTOR)
    if factor > 0:
        latent = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < d
        at = latent * d + column
        start, stop = tl.load(offsets_ptr + latent), tl.load(offsets_ptr + latent + 1)
        # asked for first, so that they are on their way while the list is read
        w = _load_weight(high_ptr, low_ptr, at, inside, SPLIT)
        if UPDATE:
            m = tl.load(m_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            v = tl.load(v_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)

        first = (start + BLOCK - 1) // BLOCK
        n_blocks = tl.maximum(stop // BLOCK - first, 0)
        theta = 0.0
        if THRESHOLD:
            theta = tl.load(theta_ptr + latent)
        plane = _plane(rows_ptr, prefix_ptr, latent, n_tokens, d, P)
        g, along, d_theta, fired = _list_sums(
            token_ptr, acts_ptr, d_acts_ptr, near_ptr, plane, start, stop,
            first * BLOCK, n_blocks * BLOCK, theta, tl.load(scalars_ptr + COUNT), d, column, inside, BLOCK_D, UNROLL,
            ENCODER, THRESHOLD,
        )  # fmt: skip
        sums_ptr += first.to(tl.int64) * d
        extras_ptr += first * 3
        for _ in range(n_blocks):
            g += tl.load(sums_ptr + column, mask=inside, other=0.0)
            along += tl.load(extras_ptr)
            d_theta += tl.load(extras_ptr + 1)
            fired += tl.load(extras_ptr + 2).to(tl.int32)
            sums_ptr += d
            extras_ptr += 3
        if not ENCODER:
            g *= scale
            w *= tl.load(inverse_norm_ptr + latent)
        if AUXK:
            slot = tl.load(slot_ptr + latent).to(tl.int64)
            aux = tl.load(scalars_ptr + AUX)
            dead = inside & (tl.zeros_like(column) + slot >= 0)
            g += aux * tl.load(aux_ptr + slot * d + column, mask=dead, other=0.0).to(tl.float32)
            along += aux * tl.load(aux_along_ptr + slot, mask=slot >= 0, other=0.0)
        if not ENCODER:
            g -= along * w
        part = parts_ptr + latent * tl.num_programs(1) + tl.program_id(1)
        if not UPDATE:
            norm = tl.sum(g * g)
            if ENCODER:
                norm += tl.where(tl.program_id(1) == 0, along * along + d_theta * d_theta, 0.0)
            tl.store(part, norm)
        else:
            w, m, v = adam(w, m, v, g * factor, scalars_ptr)
            noise = stochastic_bits(at, scalars_ptr, ENCODER)
            store_moment(m_ptr + at, m, noise, inside, ROUND)
            store_moment(v_ptr + at, v, noise >> 16, inside, ROUND)
            _store_weight(high_ptr, low_ptr, at, w, inside, SPLIT)
            if FP8:
                tl.store(fp8_ptr + at, (w / tl.load(fp8_next_ptr + latent)).to(tl.float8e4nv), mask=inside)
                tl.store(part, tl.max(tl.abs(w)))
            if not ENCODER:
                tl.store(part, tl.sum(w * w))
            if ENCODER:
                if tl.program_id(1) == 0:
                    _update_latent(
                        b_ptr, b_m_ptr, b_v_ptr, theta_ptr, theta_m_ptr, theta_v_ptr, silent_ptr, scalars_ptr, latent,
                        n_tokens, along * factor, d_theta * factor, fired, theta_faster, THRESHOLD,
                    )  # fmt: skip


@triton.jit
def _finish_rows_kernel(
    parts_ptr, inverse_norm_ptr, fp8_scale_ptr, fp8_next_ptr, scalars_ptr, n_latents, n_parts, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, DECODER: tl.constexpr,
):  # fmt: skip
    # grid (blocks of latents,)
    if tl.load(scalars_ptr + FACTOR) > 0:
        latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        c = tl.arange(0, PARTS)
        mask = (latent < n_latents)[:, None] & (c < n_parts)[None, :]
        parts = tl.load(parts_ptr + latent[:, None] * n_parts + c[None, :], mask=mask, other=0.0)
        if DECODER:
            squares = tl.where(latent < n_latents, tl.sum(parts, 1), 1.0)
            tl.store(inverse_norm_ptr + latent, tl.rsqrt(squares), mask=latent < n_latents)
        else:
            tl.store(
                fp8_scale_ptr + latent, tl.load(fp8_next_ptr + latent, mask=latent < n_latents), mask=latent < n_latents
            )
            unit = tl.maximum(tl.max(parts, 1), TINY) * (FP8_ROOM / FP8_MAX)
            tl.store(fp8_next_ptr + latent, unit, mask=latent < n_latents)


def shape_for(d: int) -> Shape:
    """The program that was fastest for such rows, measured on an H200."""
    columns = min(512, max(256, d & -d)) if d > 256 else triton.next_power_of_2(d)
    return Shape(columns, max(1, columns // 256))


def block_sums(
    lists: PackedLists, x: Tensor, pull: Tensor, scalars: Tensor, *, threshold: Tensor | None = None,
    prefixes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums over each whole block of one latent's entries, first the encoder's, then the decoder's.

    Of x [n, d] and of pull [P, n, d]: [2, blocks, d]; of all else that a list is summed for: [2, blocks, 3]. Where a
    block is not one latent's, what stands there is undefined, and `row_update` does not read it.
    """
    n_tokens, d = x.shape
    n_blocks = len(lists.latent) // BLOCK
    sums = torch.empty(2, n_blocks, d, dtype=torch.float32, device=x.device)
    extras = torch.empty(2, n_blocks, 3, dtype=torch.float32, device=x.device)
    if n_blocks:
        columns = min(256, triton.next_power_of_2(d))
        constants = {"BLOCK": BLOCK, "BLOCK_D": columns, "THRESHOLD": threshold is not None}
        entries = (lists.latent, lists.token, lists.acts, lists.d_acts, lists.near)
        _block_sums_kernel[(n_blocks, triton.cdiv(d, columns), 2)](
            *entries, x, pull, prefixes, threshold, scalars, sums, extras, len(lists.offsets) - 1, n_tokens, d,
            P=1 if prefixes is None else len(prefixes), num_warps=2, **constants,
        )  # fmt: skip
    return sums, extras


def row_update(
    weight: Rows, lists: PackedLists, rows: Tensor, scalars: Tensor, *, sums: tuple[Tensor, Tensor],
    scale: float = 1.0, latents: Latents | None = None, prefixes: Tensor | None = None, aux: AuxGrads | None = None,
    norms: Tensor | None = None, shape: Shape | None = None,
    threshold_faster: float = 1.0,
) -> None:  # fmt: skip
    """Update ``weight`` in place; the encoder's pass when ``latents`` are given, else the decoder's.

    sums      of `block_sums` of the same lists
    norms     [n_latents, column blocks] fp32: write the squared norms of the gradients, before FACTOR; update nothing
    shape     of a program; None: `shape_for`
    threshold_faster    how many times LR the thresholds learn at
    """
    n_latents, d = weight.high.shape
    encoder, n_tokens = latents is not None, rows.shape[-2]
    if weight.low is None and weight.high.dtype != torch.float32:
        raise ValueError(f"a weight without its lower half must be fp32, got {weight.high.dtype}")
    if rows.shape[-1] != d or len(lists.offsets) != n_latents + 1:
        raise ValueError(f"rows and lists must be [..., {d}] and of {n_latents} latents, got {list(rows.shape)}")
    if not encoder and weight.inverse_norm is None:
        raise ValueError("a decoder needs inverse_norm")
    sums, extras = (parts[0 if encoder else 1] for parts in sums)
    shape = shape or shape_for(d)
    n_parts = triton.cdiv(d, shape.columns)
    parts = torch.empty(n_latents, n_parts, dtype=torch.float32, device=rows.device) if norms is None else norms
    fp8 = encoder and weight.fp8 is not None
    t = latents or Latents(*[None] * 4)  # pyright: ignore[reportArgumentType]
    one_each = (t.b, t.b_m, t.b_v, t.threshold, t.threshold_m, t.threshold_v, t.silent)
    entries = (lists.offsets, lists.token, lists.acts, lists.d_acts, lists.near)
    dead = (None, None, None) if aux is None else (aux.rows, aux.along, aux.slot)
    constants = {"ENCODER": encoder, "THRESHOLD": t.threshold is not None, "AUXK": aux is not None, "FP8": fp8}
    constants |= {"SPLIT": weight.low is not None, "ROUND": weight.m.dtype == torch.bfloat16, "UPDATE": norms is None}
    _row_update_kernel[(n_latents, n_parts)](
        weight.high, weight.low, weight.m, weight.v, weight.inverse_norm, weight.fp8, weight.fp8_next, *one_each,
        *entries, rows, prefixes, sums, extras, *dead, parts, scalars, scale, threshold_faster, n_tokens, d,
        BLOCK_D=shape.columns, UNROLL=shape.unroll, BLOCK=BLOCK, num_warps=shape.warps,
        P=1 if encoder or prefixes is None else len(prefixes), **constants,
    )  # fmt: skip
    if norms is None and (fp8 or not encoder):
        _finish_rows_kernel[(triton.cdiv(n_latents, 128),)](
            parts, weight.inverse_norm, weight.fp8_scale, weight.fp8_next, scalars, n_latents, n_parts,
            PARTS=triton.next_power_of_2(n_parts), BLOCK=128, DECODER=not encoder, num_warps=4,
        )  # fmt: skip
