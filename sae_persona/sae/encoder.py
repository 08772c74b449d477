"""Encode many tokens on a GPU: candidates by a bf16 product, their activations from the weights in fp32.

    candidates    TopK: the 2 k largest of bf16 pre-activations; else those above the threshold less a margin
    activations   x @ w_enc[latent] + b_enc[latent], in fp32
    kept          the rule on these

An fp32 product of [n, 4096] and 131,072 latents takes longer than half of an 8B model does; in bf16 it takes a seventh
of it, and candidates alone are computed twice. On a CPU this is `SAE.encode`.
"""

import torch
from sae_kernels import ops
from torch import Tensor

from sae_persona.sae import sparsity
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import TopK
from sae_persona.types import SparseLatents

PRE_ENTRIES = 2**29  # bf16 pre-activations held at once: 1 GiB
GATHERED = 2**27  # numbers of gathered rows held at once
SPARE = 2  # candidates of TopK, as a multiple of k
SIGMAS = 6  # of the rounding error that a candidate may be below its threshold
ROUNDING = 2**-9.25  # standard deviation of the relative error of a product of two numbers rounded to bf16, at most
KERNEL_CANDIDATES = 256  # a token that the selection's kernel finds at most, with the larger of its chunks
KERNEL_MULTIPLE = 8  # bf16 columns that are loaded at once


class Encoder:
    """As `SAE.encode`, for activations [n, d_in] of any float dtype that carry no gradient.

    reduced   go by way of bf16. None: on a GPU
    """

    def __init__(self, sae: SAE, *, reduced: bool | None = None) -> None:
        self.sae = sae
        self.reduced = sae.w_enc.is_cuda if reduced is None else reduced
        if not self.reduced:
            return
        rule, w, b = sae.rule, sae.w_enc, sae.b_enc
        self.rows = max(1, min(2**16, PRE_ENTRIES // sae.n_latents))
        if isinstance(rule, TopK):
            self.w, self.b = w.bfloat16(), b.float()
            self.m = min(SPARE * rule.k, sae.n_latents)
            return
        # three columns more: the margin, which grows with the norm of x, and what is added to the product, in two
        # parts, so that bf16 loses nothing of it. The rounding of the result cannot change its sign
        margin = w.abs().amax(dim=1) * (SIGMAS * ROUNDING)
        added = b.float() - self._threshold()
        high = added.bfloat16()
        self.w = _widened(w, margin, high, added - high)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> SparseLatents:
        """The latents that fire on each token of x [n, d_in]. ModelError on another width."""
        self.sae.check_width(x.shape[-1])
        if not self.reduced:
            return self.sae.encode(x.to(self.sae.w_enc.dtype))
        one = self._topk if isinstance(self.sae.rule, TopK) else self._local
        return sparsity.cat([one(part) for part in x.split(self.rows)])

    def _topk(self, x: Tensor) -> SparseLatents:
        rule, sae = self.sae.rule, self.sae
        assert isinstance(rule, TopK)
        k = min(rule.k, sae.n_latents)
        if x.is_cuda and x.shape[1] % KERNEL_MULTIPLE == 0 and self.m <= KERNEL_CANDIDATES:
            return SparseLatents(*self._rescored(x, self._candidates(x.bfloat16().contiguous())))
        _, idx = ops.topk(torch.nn.functional.linear(x.bfloat16(), self.w, self.b.bfloat16()), self.m)
        idx = idx.sort(dim=1).values
        token = torch.arange(len(x), device=x.device).repeat_interleave(self.m)
        pre = self._exact(x, token, idx.flatten()).view(idx.shape)
        values, at = pre.sort(dim=1, descending=True, stable=True)  # of equal ones the lowest latent
        return SparseLatents(values[:, :k].relu(), idx.gather(1, at[:, :k]))

    def _rescored(self, x: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The k best of some latents [n, m] int32 on x [n, d_in] by the weights in fp32: acts and idx [n, k]."""
        from sae_kernels.rescore import rescore  # here, so that CPU users need no Triton

        sae = self.sae
        assert isinstance(sae.rule, TopK)
        k = min(sae.rule.k, sae.n_latents)
        acts, idx = rescore(candidates, x.float().contiguous(), sae.w_enc, sae.b_enc, k)
        return acts, idx.long()

    def _candidates(self, x: Tensor) -> Tensor:
        """The m latents of the largest pre-activations of x [n, d_in] bf16: [n, m] int32, ascending."""
        from sae_kernels.encode import chunk_for, encode
        from sae_kernels.select import select

        n_latents = self.sae.n_latents
        chunk = chunk_for(n_latents, self.m)
        n_chunks = -(-n_latents // chunk)
        pre = torch.empty(len(x), n_chunks * chunk, dtype=x.dtype, device=x.device)
        maxima = torch.empty(len(x), n_chunks, dtype=x.dtype, device=x.device)
        encode(x, self.w, self.b, pre=pre, maxima=maxima)
        return select(pre, maxima, n_latents, self.m)[1]

    def _local(self, x: Tensor) -> SparseLatents:
        """A rule under which each latent decides alone."""
        n_latents = self.sae.n_latents
        norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        pre = _widened(x, norm, torch.ones_like(norm), torch.ones_like(norm)) @ self.w.T
        flat = (pre > 0).flatten().nonzero().flatten()
        token, idx = flat // n_latents, flat % n_latents
        acts = self._exact(x, token, idx)
        fires = (acts > self._threshold()[idx]).nonzero().flatten()
        offsets = torch.bincount(token[fires], minlength=len(x)).cumsum(0)
        return SparseLatents(acts[fires], idx[fires], torch.nn.functional.pad(offsets, (1, 0)))

    def _threshold(self) -> Tensor:
        sae = self.sae
        return torch.zeros_like(sae.b_enc) if sae.threshold is None else sae.threshold.clamp(min=0)

    def _exact(self, x: Tensor, token: Tensor, idx: Tensor) -> Tensor:
        """Pre-activations of pairs of a token and a latent [m], in fp32."""
        w, b = self.sae.w_enc, self.sae.b_enc
        size = max(1, GATHERED // self.sae.d_in)
        parts = [
            (x[t].float() * w[i]).sum(dim=1) + b[i] for t, i in zip(token.split(size), idx.split(size), strict=True)
        ]
        return torch.cat(parts)


def _widened(x: Tensor, *columns: Tensor) -> Tensor:
    """[n, d] with more columns [n] behind, in bf16, and zeros up to a width that the product likes."""
    n_zeros = -(x.shape[1] + len(columns)) % KERNEL_MULTIPLE
    more = [column.bfloat16()[:, None] for column in columns]
    return torch.cat([x.bfloat16(), *more, x.new_zeros(len(x), n_zeros, dtype=torch.bfloat16)], dim=1)
