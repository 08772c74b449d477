"""Sparse decode: rebuild each token's activation from its active latents.

    out[i, :] = sum of acts[e] * w_dec[idx[e], :]  over entries e of token i          (the caller adds b_dec)

    acts     [n, k] or [nnz]       fp32 | bf16
    idx      as acts               int64       0 <= idx < n_latents: not checked, the check would sync
    w_dec    [n_latents, d_in]     as acts     d_in <= 8192
    offsets  None or [n + 1]       int64       None with acts [n, k]; CSR with acts [nnz]: values not checked
    out      [n, d_in]             as acts     row-major; summed in fp32, rounded once

Inputs that are not contiguous are copied. Repeated indices of a token add up; a token without entries gives zeros.
Gradients reach `acts` and `w_dec`; that of `w_dec` is summed latent by latent over lists sorted once, without
atomics, so it is the same on every run. Oracles: `reference.sparse_decode`, `reference.weight_grad`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kernels.latent_lists import LatentLists, latent_lists

DTYPES = (torch.float32, torch.bfloat16)
MAX_D_IN = 8192  # one program holds a whole row in registers
MAX_BLOCK = 1024  # columns that one program of the weight gradient sums


@triton.jit
def _forward_kernel(acts_ptr, idx_ptr, offsets_ptr, w_ptr, out_ptr, d_in, BLOCK_D: tl.constexpr):
    # grid (n,): program n writes out[n, :]
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row = tl.zeros([BLOCK_D], tl.float32)
    for e in range(tl.load(offsets_ptr + n), tl.load(offsets_ptr + n + 1)):
        latent = tl.load(idx_ptr + e)
        act = tl.load(acts_ptr + e).to(tl.float32)
        row += act * tl.load(w_ptr + latent * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * d_in + d, row, mask=d < d_in)


@triton.jit
def _acts_grad_kernel(g_ptr, idx_ptr, offsets_ptr, w_ptr, d_acts_ptr, d_in, BLOCK_D: tl.constexpr):
    # grid (n,): program n writes d_acts of its entries
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    g = tl.load(g_ptr + n * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
    for e in range(tl.load(offsets_ptr + n), tl.load(offsets_ptr + n + 1)):
        latent = tl.load(idx_ptr + e)
        w = tl.load(w_ptr + latent * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
        tl.store(d_acts_ptr + e, tl.sum(w * g, axis=0))


@triton.jit
def _weight_grad_kernel(values_ptr, token_ptr, offsets_ptr, rows_ptr, out_ptr, d_in, BLOCK_D: tl.constexpr):
    # grid (n_latents, column blocks): program (l, b) writes block b of out[l, :]
    latent = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for e in range(tl.load(offsets_ptr + latent), tl.load(offsets_ptr + latent + 1)):
        token = tl.load(token_ptr + e)
        value = tl.load(values_ptr + e).to(tl.float32)
        total += value * tl.load(rows_ptr + token * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
    tl.store(out_ptr + latent * d_in + d, total, mask=d < d_in)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, acts: Tensor, idx: Tensor, w_dec: Tensor, offsets: Tensor) -> Tensor:
        n, d_in = len(offsets) - 1, w_dec.shape[1]
        out = acts.new_empty(n, d_in)
        _forward_kernel[(n,)](acts, idx, offsets, w_dec, out, d_in, BLOCK_D=triton.next_power_of_2(d_in))
        ctx.save_for_backward(acts, idx, w_dec, offsets)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        acts, idx, w_dec, offsets = ctx.saved_tensors
        d_in, g = w_dec.shape[1], grad_out.contiguous()
        d_acts = d_w_dec = None
        if ctx.needs_input_grad[0]:
            d_acts = torch.empty_like(acts)
            grid = (len(offsets) - 1,)
            _acts_grad_kernel[grid](g, idx, offsets, w_dec, d_acts, d_in, BLOCK_D=triton.next_power_of_2(d_in))
        if ctx.needs_input_grad[2]:
            lists = latent_lists(idx, len(w_dec), offsets)
            d_w_dec = weight_grad(lists, acts, g)
        return d_acts, None, d_w_dec, None


def weight_grad(lists: LatentLists, values: Tensor, rows: Tensor) -> Tensor:
    """As `ops.weight_grad`. Summed in fp32, rounded once to the dtype of ``rows``."""
    values = values.flatten().index_select(0, lists.entry)
    n_latents, d_in = len(lists.offsets) - 1, rows.shape[1]
    out = rows.new_empty(n_latents, d_in)
    block = min(MAX_BLOCK, triton.next_power_of_2(d_in))
    grid = (n_latents, triton.cdiv(d_in, block))
    _weight_grad_kernel[grid](values, lists.token, lists.offsets, rows.contiguous(), out, d_in, BLOCK_D=block)
    return out


def sparse_decode(acts: Tensor, idx: Tensor, w_dec: Tensor, offsets: Tensor | None = None) -> Tensor:
    if idx.dtype != torch.int64 or idx.shape != acts.shape:
        raise ValueError(f"idx must be int64 {list(acts.shape)} like acts, got {idx.dtype} {list(idx.shape)}")
    if acts.dtype not in DTYPES or w_dec.dtype != acts.dtype:
        raise ValueError(f"acts and w_dec must share one of {DTYPES}, got {acts.dtype} and {w_dec.dtype}")
    if w_dec.shape[1] > MAX_D_IN:
        raise ValueError(f"d_in must be at most {MAX_D_IN}, got w_dec {list(w_dec.shape)}")
    if acts.ndim != (2 if offsets is None else 1):
        raise ValueError(f"acts must be [n, k], or [nnz] with offsets, got {list(acts.shape)}")
    if offsets is None:
        n, k = acts.shape
        offsets = torch.arange(n + 1, device=acts.device) * k
    elif offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be int64, got {offsets.dtype}")
    return _SparseDecode.apply(acts.contiguous(), idx.contiguous(), w_dec.contiguous(), offsets.contiguous())
