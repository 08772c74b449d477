"""The public ops. The device of the tensor in hand chooses: Triton on CUDA, plain torch anywhere else.

`reference.py` holds the formula of each. Entries of a sparse batch come as [n, k], or flat as [nnz] with CSR
`offsets` [n + 1]: token i owns entries offsets[i] to offsets[i + 1].
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_kernels import reference
from sae_kernels.latent_lists import LatentLists, latent_lists
from sae_kernels.reference import cells
from sae_kernels.topk import topk
from sae_kernels.values import CELLS, NullCounts

__all__ = [
    "LatentLists",
    "NullCounts",
    "cells",
    "edit_rows",
    "latent_lists",
    "null_counts",
    "sparse_decode",
    "topk",
    "weight_grad",
]

_LATENTS = 2048  # of one product on a CPU
_SERIAL = 2**15  # elements up to which torch starts no threads
_EXACT = 2**24  # fp32 holds every whole number up to here


def edit_rows(x: Tensor, on: Tensor, enc: Tensor, bias: Tensor, threshold: Tensor, dec: Tensor, line: Tensor) -> Tensor:
    """x [n, d] moved along rows of dec [m, d] by what their lines make of what the rows of enc [m, d] read.

        f = enc x + bias, 0 where not above threshold          f' = min(max(slope f + shift, low), high)
        x + sum over the rows that are on of (f' - f) dec      where that sum is 0, x bit for bit

    on [n, m] bool; bias, threshold [m]; line [m, 4]: slope, shift, low, high; all fp32, x in any float dtype.
    Gradients reach x; where it wants any, in plain torch.
    """
    if x.is_cuda and not (x.requires_grad and torch.is_grad_enabled()):
        from sae_kernels import edit_rows as triton_op

        return triton_op.edit_rows(x, on, enc, bias, threshold, dec, line)
    return reference.edit_rows(x, on, enc, bias, threshold, dec, line)


def sparse_decode(acts: Tensor, idx: Tensor, w_dec: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Sum of act * row of w_dec [n_latents, d_in] over each token's entries: [n, d_in], without b_dec.

    Gradients reach ``acts`` and ``w_dec``.
    """
    if acts.is_cuda:
        from sae_kernels import sparse_decode as triton_op  # here, so that CPU users need no Triton

        return triton_op.sparse_decode(acts, idx, w_dec, offsets)
    return F.embedding_bag(
        idx, w_dec, offsets, mode="sum", per_sample_weights=acts, include_last_offset=offsets is not None
    )


def weight_grad(lists: LatentLists, values: Tensor, rows: Tensor) -> Tensor:
    """Sum of value * row of its token over each latent's entries: [n_latents, d].

    ``values`` is laid out as the idx that the lists were made from, ``rows`` is [n, d]. With the activations and the
    gradient of the reconstruction this is the gradient of w_dec; with the gradient of the activations and the SAE's
    input, that of w_enc. Not differentiable.
    """
    if rows.is_cuda:
        from sae_kernels import sparse_decode as triton_op

        return triton_op.weight_grad(lists, values, rows)
    values = values.detach().flatten().index_select(0, lists.entry)
    return F.embedding_bag(
        lists.token, rows.detach(), lists.offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def null_counts(
    value: Tensor, row: Tensor, offsets: Tensor, labels: Tensor, scale: Tensor, shift: Tensor, bar: Tensor, *,
    n: int, two_sided: bool, wide: bool = False,
) -> NullCounts:  # fmt: skip
    """Compare sums of values * labels, standardised, with a bar for each latent; table in `null_counts.py`.

    On a CPU sparse-dense products in fp32; whole numbers are split into digits whose sums fp32 holds exactly. Only the
    products are shared out to threads, in large pieces: on a busy machine threads wait for each other, and pieces of
    the size that stays in the cache took ten times as long in two threads as in one.
    """
    if value.is_cuda:
        from sae_kernels import null_counts as triton_op

        return triton_op.null_counts(
            value, row, offsets, labels, scale, shift, bar, n=n, two_sided=two_sided, wide=wide
        )
    digits = [(1, value)] if value.is_floating_point() else list(_digits(value, offsets))
    columns, bounds = labels.float(), offsets.tolist()
    at_least = torch.empty(len(scale), dtype=torch.int64)
    maxima = torch.full((n,), -torch.inf, dtype=torch.float64)
    histogram = torch.zeros(CELLS, dtype=torch.int64)
    for first in range(0, len(scale), _LATENTS):
        last = min(first + _LATENTS, len(scale))
        here, within = slice(bounds[first], bounds[last]), offsets[first : last + 1] - bounds[first]
        sums = [
            F.embedding_bag(
                row[here], columns, within, mode="sum", per_sample_weights=digit[here].float(), include_last_offset=True
            )
            for _, digit in digits
        ]
        for i in range(first, last, step := max(1, _SERIAL // n)):
            j = min(i + step, last)
            s = torch.zeros(j - i, n, dtype=torch.float64)
            for (unit, _), part in zip(digits, sums, strict=True):
                s.add_(part[i - first : j - first, :n], alpha=unit)
            s.mul_(scale[i:j, None]).sub_(shift[i:j, None])
            s = s.abs_() if two_sided else s
            at_least[i:j] = (s >= bar[i:j, None]).sum(1)
            maxima = torch.maximum(maxima, s.amax(0))
            histogram += torch.bincount(cells(s[scale[i:j] != 0]).flatten(), minlength=CELLS)
    return NullCounts(at_least, maxima, histogram)


def _digits(value: Tensor, offsets: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Signed digits of whole numbers, each with its unit, such that a latent's sum of any of them is exact in fp32."""
    longest = int(offsets.diff().max()) if len(value) else 0
    if longest * int(value.abs().max() if len(value) else 0) < _EXACT:
        yield 1, value
        return
    base, unit = 2, 1
    while base * longest < _EXACT:  # a digit is at most half of the base
        base *= 2
    while value.any():
        digit = (value + base // 2) % base - base // 2
        yield unit, digit
        value, unit = (value - digit) // base, unit * base
