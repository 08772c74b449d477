"""Oracles in plain torch: one per op, same name, same arguments, too simple to be wrong. Never imports triton.

Those of a training step sum in fp64 where their inputs are fp64, else in fp32, and round once.
"""

from itertools import pairwise

import torch
from torch import Tensor

from sae_kernels.latent_lists import LatentLists
from sae_kernels.values import (
    AUX,
    BETAS,
    BLOCK,
    BLOCK_N,
    CELL_SHIFT,
    CELLS,
    COUNT,
    EPS,
    FACTOR,
    FLAGGED,
    FP8_HEADROOM,
    FP8_LARGEST,
    LOSS,
    LOWEST_CELL,
    LR,
    M_FIX,
    STEP,
    V_FIX,
    AuxGrads,
    Entries,
    LatentOrder,
    Latents,
    NullCounts,
    PackedLists,
    Rows,
)


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, idx = x.sort(dim=1, descending=True, stable=True)
    return values[:, :k], idx[:, :k]


def sparse_decode(acts: Tensor, idx: Tensor, w_dec: Tensor, offsets: Tensor | None = None) -> Tensor:
    if offsets is None:
        return (acts[:, :, None] * w_dec[idx]).sum(dim=1)
    return torch.stack([(acts[a:b, None] * w_dec[idx[a:b]]).sum(dim=0) for a, b in pairwise(offsets.tolist())])


def edit_rows(x: Tensor, on: Tensor, enc: Tensor, bias: Tensor, threshold: Tensor, dec: Tensor, line: Tensor) -> Tensor:
    pre = _wide(x) @ enc.T + bias
    f = pre.where(pre > threshold, 0.0)
    slope, shift, low, high = line.unbind(dim=1)
    delta = ((slope * f + shift).clamp(low, high) - f).where(on, 0.0)
    moved = (_wide(x) + delta @ dec).to(x.dtype)
    return moved.where((delta != 0).any(dim=1, keepdim=True), x)


def latent_lists(idx: Tensor, n_latents: int, offsets: Tensor | None = None) -> LatentLists:
    lengths = torch.full((len(idx),), idx.shape[1]) if offsets is None else offsets.diff().cpu()
    token = torch.arange(len(lengths)).repeat_interleave(lengths).to(idx.device)
    entries = [(idx.flatten() == latent).nonzero().flatten() for latent in range(n_latents)]
    counts = torch.tensor([0] + [len(e) for e in entries], device=idx.device)
    return LatentLists(torch.cat(entries), token[torch.cat(entries)], counts.cumsum(0))


def weight_grad(lists: LatentLists, values: Tensor, rows: Tensor) -> Tensor:
    terms = values.flatten()[lists.entry, None] * rows[lists.token]
    return torch.stack([terms[a:b].sum(dim=0) for a, b in pairwise(lists.offsets.tolist())])


def cells(s: Tensor) -> Tensor:
    """The cell of the histogram that each statistic is counted in: int64."""
    return ((s.float().view(torch.int32) >> CELL_SHIFT) - LOWEST_CELL).clamp(0, CELLS - 1).long()


def null_counts(
    value: Tensor, row: Tensor, offsets: Tensor, labels: Tensor, scale: Tensor, shift: Tensor, bar: Tensor, *,
    n: int, two_sided: bool, wide: bool = False,
) -> NullCounts:  # fmt: skip
    labels = labels[:, :n].double()
    sums = torch.stack([value[a:b].double() @ labels[row[a:b]] for a, b in pairwise(offsets.tolist())])
    s = sums * scale[:, None] - shift[:, None]
    s = s.abs() if two_sided else s
    histogram = torch.bincount(cells(s[scale != 0]).flatten(), minlength=CELLS)
    return NullCounts((s >= bar[:, None]).sum(1), s.amax(0), histogram)


def _wide(x: Tensor) -> Tensor:
    """In the type that sums are taken in."""
    return x if x.dtype == torch.float64 else x.float()


def split(w: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    inner = (w.view(torch.int32) & -0x10000).view(torch.float32)
    outer = (inner.view(torch.int32) + 0x10000).view(torch.float32)
    high = torch.where((w - inner).abs() < (outer - w).abs(), inner, outer)
    return high.bfloat16(), (w.view(torch.int32) - high.view(torch.int32)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    return (high.float().view(torch.int32) + low.int()).view(torch.float32)


def prepare(
    x: Tensor, order: Tensor | None, mean: Tensor, scale: float, *, z: Tensor, z8: Tensor | None = None,
    z8_scale: Tensor | None = None, side: int = 0,
) -> None:  # fmt: skip
    x = _wide(x) if order is None else _wide(x)[:, order.long()]
    exact = torch.nn.functional.pad((x - mean) * scale, (0, z.shape[1] - x.shape[1]))
    z.copy_(exact)
    if z8 is not None and z8_scale is not None:
        exact[:, :side] = 0
        z8_scale.copy_(exact.abs().amax(dim=1).clamp(min=1e-30) / FP8_LARGEST)
        z8.copy_((exact / z8_scale[:, None]).to(torch.float8_e4m3fn))


def encode(
    x: Tensor, w: Tensor, b: Tensor, *, pre: Tensor, maxima: Tensor, x_scale: Tensor | None = None,
    w_scale: Tensor | None = None, side: int = 0, x_side: Tensor | None = None, w_side: Tensor | None = None,
    tile: object = None,
) -> None:  # fmt: skip
    product = _wide(x) @ _wide(w).T
    if x_scale is not None and w_scale is not None:
        product = product * x_scale[:, None] * w_scale
    if x_side is not None and w_side is not None:
        product = product + _wide(x_side)[:, :side] @ _wide(w_side)[:, :side].T
    pre.fill_(-torch.inf)
    pre[:, : len(w)] = product + b
    maxima.copy_(pre.view(*maxima.shape, -1).amax(dim=2))


def select(pre: Tensor, maxima: Tensor, n_latents: int, k: int) -> tuple[Tensor, Tensor]:
    idx = topk(pre[:, :n_latents], k)[1].sort(dim=1).values
    return _wide(pre).gather(1, idx).relu(), idx.int()


def rescore(candidates: Tensor, x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    latent = candidates.long()
    score = (_wide(x)[:, None] * _wide(w)[latent]).sum(dim=2) + b[latent]
    best = topk(score, k)[1].sort(dim=1).values
    return score.gather(1, best).relu(), candidates.gather(1, best)


def winners(everyone: Tensor, idx: Tensor, rank: int, n_latents: int) -> Entries:
    ranks, n, k = everyone.shape
    best = topk(everyone.transpose(0, 1).flatten(1), k)[1]
    wins = torch.zeros(n, ranks * k, dtype=torch.bool, device=idx.device).scatter_(1, best, True).view(n, ranks, k)
    wins &= ~(everyone.transpose(0, 1) <= 0)
    own = wins[:, rank]
    acts, latents = everyone.new_zeros(n * k), torch.full((n * k,), n_latents, dtype=torch.int32, device=idx.device)
    acts[: own.sum()], latents[: own.sum()] = everyone[rank][own], idx[own]
    offsets = torch.nn.functional.pad(own.sum(dim=1).cumsum(0), (1, 0)).int()
    return Entries(acts, latents, offsets, active=wins.flatten(1).sum(dim=1).int())


def batch_topk(pre: Tensor, maxima: Tensor, n_latents: int, k: int) -> Entries:
    n = len(pre)
    flat = _wide(pre)[:, :n_latents].flatten()
    best = topk(flat[None], n * k)[1][0]
    best = best[flat[best] > 0].sort().values
    offsets = [int((best < i * n_latents).sum()) for i in range(n + 1)]
    acts, idx = flat.new_zeros(n * k), torch.full((n * k,), n_latents, dtype=torch.int32, device=pre.device)
    acts[: len(best)], idx[: len(best)] = flat[best], (best % n_latents).int()
    return Entries(acts, idx, torch.tensor(offsets, dtype=torch.int32, device=pre.device))


def jump(pre: Tensor, maxima: Tensor, threshold: Tensor, bandwidth: float, entries: Entries, *, first: int = 0) -> None:
    assert entries.near is not None and entries.active is not None, "JumpReLU needs both"
    for i, row in enumerate(_wide(pre)[:, : len(threshold)], start=first):
        fires, near = row > threshold, (row - threshold).abs() < bandwidth / 2
        start = int(entries.offsets[i])
        chosen = (fires | near).nonzero().flatten()[: len(entries.acts) - start]
        stop = start + len(chosen)
        entries.idx[start:stop] = chosen.int()
        entries.acts[start:stop] = (row * fires)[chosen]
        entries.near[start:stop] = near[chosen] / bandwidth
        entries.offsets[i + 1], entries.active[i] = stop, fires.sum()


def group_sums(
    acts: Tensor, idx: Tensor, offsets: Tensor, w_dec: Tensor, inverse_norm: Tensor, *, sums: Tensor,
    prefixes: Tensor | None = None, columns: int | None = None,
) -> None:  # fmt: skip
    rows = _wide(w_dec) * inverse_norm[:, None]
    sizes = torch.tensor([len(w_dec)], device=acts.device) if prefixes is None else prefixes
    for i, (start, stop) in enumerate(pairwise(offsets.tolist())):
        latent = idx[start:stop].long()
        group = (latent[:, None] >= sizes).sum(dim=1)
        terms = acts[start:stop, None] * rows[latent]
        sums[:, i] = torch.stack([terms[group == g].sum(dim=0) for g in range(len(sizes))])


def decode_error(
    acts: Tensor, idx: Tensor, offsets: Tensor, w_dec: Tensor, inverse_norm: Tensor, x: Tensor, b_dec: Tensor,
    scale: float, *, pull: Tensor, token: Tensor, d_acts: Tensor, squares: Tensor, whole: Tensor,
    prefixes: Tensor | None = None, sums: Tensor | None = None, columns: int | None = None,
) -> None:  # fmt: skip
    """All in the first of the blocks, whose sum is meant."""
    rows = _wide(w_dec) * inverse_norm[:, None]
    sizes = torch.tensor([len(w_dec)], device=x.device) if prefixes is None else prefixes
    squares.zero_()
    whole.zero_()
    for i, (start, stop) in enumerate(pairwise(offsets.tolist())):
        latent = idx[start:stop].long()
        terms = acts[start:stop, None] * rows[latent]
        rebuilt = [terms[latent < size].sum(dim=0) for size in sizes] if sums is None else sums[:, i].cumsum(0)
        errors = torch.stack([one + b_dec - _wide(x)[i] for one in rebuilt])
        kept = errors if len(sizes) == 1 else errors.to(pull.dtype).to(errors.dtype)
        pulls = torch.stack([kept[g:].sum(dim=0) / len(sizes) for g in range(len(sizes))])
        pull[:, i] = pulls
        token[start:stop] = i
        squares[0, i], whole[0, i] = errors.square().sum() / len(sizes), errors[-1].square().sum()
        group = (latent[:, None] >= sizes).sum(dim=1)
        d_acts[:, start:stop] = 0
        d_acts[0, start:stop] = scale * (pulls[group] * rows[latent]).sum(dim=1)


def latent_order(idx: Tensor, n_latents: int) -> LatentOrder:
    entries = [(idx == latent).nonzero().flatten() for latent in range(n_latents + 1)]
    entry, counts = torch.cat(entries), torch.tensor([0] + [len(one) for one in entries[:-1]], device=idx.device)
    return LatentOrder(idx[entry], entry, counts.cumsum(0).int())


def packed_lists(
    idx: Tensor, token: Tensor, acts: Tensor, d_acts: Tensor, n_latents: int, *, near: Tensor | None = None,
    order: LatentOrder | None = None,
) -> PackedLists:  # fmt: skip
    order = latent_order(idx, n_latents)
    e = order.entry
    near = None if near is None else near[e]
    return PackedLists(order.latent, token[e], acts[e], d_acts.sum(dim=0)[e], near, order.offsets)


def keep_auxk(pre: Tensor, dead: Tensor, n_latents: int, k_aux: int, *, kept: Tensor | None = None) -> Tensor:
    real = torch.nn.functional.pad(pre[:, :n_latents].relu(), (0, 1))  # and a 0 for places that are none
    values, place = topk(real[:, dead.long()], min(k_aux, len(dead)))
    kept = torch.empty(len(pre), len(dead), dtype=pre.dtype, device=pre.device) if kept is None else kept
    return kept.zero_().scatter_(1, place, values)


def prune_auxk(everyone: Tensor, k_aux: int, rank: int, *, kept: Tensor) -> None:
    ranks, n, m = everyone.shape
    values, place = topk(everyone.transpose(0, 1).flatten(1), min(k_aux, ranks * m))
    pruned = torch.zeros(n, ranks * m, dtype=kept.dtype, device=kept.device).scatter_(1, place, values)
    kept.copy_(pruned.view(n, ranks, m)[:, rank])


def scaled_rows(w: Tensor, inverse_norm: Tensor, dead: Tensor) -> Tensor:
    rows = torch.nn.functional.pad(_wide(w) * inverse_norm[:, None], (0, 0, 0, 1))
    return rows[dead.long()].to(w.dtype)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    return (_wide(a) * _wide(b)).sum(dim=1)


def begin(scalars: Tensor, lr: float, step: int, betas: tuple[float, float]) -> None:
    scalars[LR], scalars[STEP] = lr, step
    scalars[M_FIX], scalars[V_FIX] = (1 / (1 - beta**step) for beta in betas)


def conclude(
    scalars: Tensor, squares: Tensor, *, active: Tensor | None = None, k: int = 1, sparsity_coef: float = 0.0,
    n_dead: Tensor | None = None, auxk_coef: float = 0.0, k_aux: int = 1,
) -> None:  # fmt: skip
    n = squares.shape[-1]
    scalars[LOSS] = squares.sum() / n
    scalars[FACTOR] = scalars[LOSS].isfinite()
    scalars[FLAGGED] += ~scalars[LOSS].isfinite()
    if active is not None:
        scalars[COUNT] = 2 * sparsity_coef * (active.sum() / n / k - 1) / (k * n)
    if n_dead is not None:
        scalars[AUX] = auxk_coef * (n_dead[0] / k_aux).clamp(max=1) * 2 / n


def clip_factor(scalars: Tensor, norms: Tensor, clip: float) -> None:
    if scalars[FACTOR] > 0:
        scalars[FACTOR] *= (clip / (norms.sum().sqrt() + 1e-6)).clamp(max=1)


def column_sums(pull: Tensor) -> Tensor:
    return torch.stack([part.sum(dim=0) for part in _wide(pull).split(BLOCK_N)])


def bias_update(
    b: Tensor, m: Tensor, v: Tensor, sums: Tensor, scalars: Tensor, *, scale: float, norms: Tensor | None = None
) -> None:
    g = scale * sums.sum(dim=0)
    if norms is not None:
        norms.copy_(g.square())
    elif scalars[FACTOR] > 0:
        b.copy_(_adam(b, m, v, g * scalars[FACTOR], scalars))


def block_sums(
    lists: PackedLists, x: Tensor, pull: Tensor, scalars: Tensor, *, threshold: Tensor | None = None,
    prefixes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of every block, also of one that is not one latent's."""
    n_blocks, found = len(lists.latent) // BLOCK, []
    for terms in (_encoder_terms(lists, x, scalars, threshold), _decoder_terms(lists, pull, prefixes)):
        block = torch.arange(len(terms[0]), device=x.device) // BLOCK
        inside = block < n_blocks
        sums = (term.new_zeros(n_blocks, term.shape[1]) for term in terms)
        found.append([total.index_add(0, block[inside], term[inside]) for total, term in zip(sums, terms, strict=True)])
    (rows, extras), (pulled, others) = found
    return torch.stack([rows, pulled]), torch.stack([extras, others])


def row_update(
    weight: Rows, lists: PackedLists, rows: Tensor, scalars: Tensor, *, sums: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0, latents: Latents | None = None, prefixes: Tensor | None = None, aux: AuxGrads | None = None,
    norms: Tensor | None = None, shape: object = None, threshold_faster: float = 1.0,
) -> None:  # fmt: skip
    """Moments in bf16 are rounded to nearest; norms are all in the first block of columns."""
    factor, n_latents = scalars[FACTOR], len(weight.high)
    if factor == 0:
        return
    latent = lists.latent[: int(lists.offsets[-1])].long()
    if latents is None:
        terms, extras = _decoder_terms(lists, rows, prefixes)
    else:
        terms, extras = _encoder_terms(lists, rows, scalars, latents.threshold)
    g = terms.new_zeros(n_latents, terms.shape[1]).index_add(0, latent, terms)
    along, d_threshold, fired = extras.new_zeros(n_latents, 3).index_add(0, latent, extras).unbind(dim=1)
    w = _wide(weight.high) if weight.low is None else join(weight.high, weight.low)
    if latents is None:
        assert weight.inverse_norm is not None, "a decoder's rows have norms"
        g, w = g * scale, w * weight.inverse_norm[:, None]
    if aux is not None:
        dead = aux.slot >= 0
        g[dead] += scalars[AUX] * _wide(aux.rows)[aux.slot[dead].long()]
        along[dead] += scalars[AUX] * aux.along[aux.slot[dead].long()]
    if latents is None:
        g = g - along[:, None] * w
    if norms is not None:
        alone = 0 if latents is None else along.square() + d_threshold.square()
        norms.zero_()
        norms.view(n_latents, -1)[:, 0] = g.square().sum(dim=1) + alone
        return
    w = _adam(w, weight.m, weight.v, g * factor, scalars)
    if weight.low is None:
        weight.high.copy_(w)
    else:
        high, low = split(w)
        weight.high.copy_(high)
        weight.low.copy_(low)
    if latents is None:
        assert weight.inverse_norm is not None, "a decoder's rows have norms"
        weight.inverse_norm.copy_(1 / w.norm(dim=1))
        return
    if weight.fp8 is not None:
        assert weight.fp8_scale is not None and weight.fp8_next is not None, "a copy in e4m3 has scales"
        weight.fp8.copy_((w / weight.fp8_next[:, None]).clamp(-FP8_LARGEST, FP8_LARGEST).to(weight.fp8.dtype))
        weight.fp8_scale.copy_(weight.fp8_next)
        weight.fp8_next.copy_(w.abs().amax(dim=1).clamp(min=1e-30) * (FP8_HEADROOM / FP8_LARGEST))
    t = latents
    t.b.copy_(_adam(t.b, t.b_m, t.b_v, along * factor, scalars))
    if t.threshold is not None:
        assert t.threshold_m is not None and t.threshold_v is not None, "what is trained has moments"
        moved = _adam(t.threshold, t.threshold_m, t.threshold_v, d_threshold * factor, scalars, threshold_faster)
        t.threshold.copy_(moved.clamp(min=0))
    t.silent.copy_(torch.where(fired > 0, 0, t.silent + rows.shape[-2]))


def _encoder_terms(lists: PackedLists, x: Tensor, scalars: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each entry adds to its latent's row [nnz, d]; to those of b_enc and threshold, and to firings [nnz, 3]."""
    nnz = int(lists.offsets[-1])
    latent, token = lists.latent[:nnz].long(), lists.token[:nnz].long()
    acts, d_acts = lists.acts[:nnz], lists.d_acts[:nnz]
    fires = (acts > 0).to(acts.dtype)
    d_threshold = torch.zeros_like(acts)
    if threshold is not None and lists.near is not None:
        d_threshold = -lists.near[:nnz] * (threshold[latent] * d_acts + scalars[COUNT])
    d_pre = fires * d_acts
    return d_pre[:, None] * _wide(x)[token], torch.stack([d_pre, d_threshold, fires], dim=1)


def _decoder_terms(lists: PackedLists, pull: Tensor, prefixes: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each entry adds to its latent's row [nnz, d]; to the part along it, and to nothing else [nnz, 3]."""
    nnz = int(lists.offsets[-1])
    latent, token = lists.latent[:nnz].long(), lists.token[:nnz].long()
    acts, d_acts = lists.acts[:nnz], lists.d_acts[:nnz]
    plane = 0 if prefixes is None else (latent[:, None] >= prefixes).sum(dim=1)
    pull = pull[None] if pull.ndim == 2 else pull
    along, nothing = acts * d_acts, torch.zeros_like(acts)
    return acts[:, None] * _wide(pull)[plane, token], torch.stack([along, nothing, nothing], dim=1)


def _adam(w: Tensor, m: Tensor, v: Tensor, g: Tensor, scalars: Tensor, faster: float = 1.0) -> Tensor:
    """The weight after a step with gradient g; the moments in place."""
    new_m, new_v = BETAS[0] * _wide(m) + (1 - BETAS[0]) * g, BETAS[1] * _wide(v) + (1 - BETAS[1]) * g * g
    m.copy_(new_m)
    v.copy_(new_v)
    return w - faster * scalars[LR] * (new_m * scalars[M_FIX]) / ((new_v * scalars[V_FIX]).sqrt() + EPS)
