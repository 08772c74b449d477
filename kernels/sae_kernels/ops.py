"""The public ops. The device of the tensor in hand chooses: Triton on CUDA, plain torch anywhere else.

`reference.py` holds the formula of each. Entries of a sparse batch come as [n, k], or flat as [nnz] with CSR
`offsets` [n + 1]: token i owns entries offsets[i] to offsets[i + 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_kernels import reference
from sae_kernels.latent_lists import LatentLists, latent_lists
from sae_kernels.topk import topk

__all__ = ["LatentLists", "edit_rows", "latent_lists", "sparse_decode", "topk", "weight_grad"]


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
