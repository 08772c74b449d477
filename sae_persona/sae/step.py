"""One training step. The gradients of the main loss are written out: every dense one would be n_latents wide.

error = acts @ w_dec + b_dec - x     loss = mean over tokens of |error|^2 + auxk_coef * AuxK
d_error = 2 error / n                d_act = d_error[token] . w_dec[latent], 0 where the ReLU cut
d_w_dec[l] = sum of act * d_error[token]      over the entries (token, latent, act) of latent l
d_w_enc[l] = sum of d_act * x[token]          over the same
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from sae_kernels import ops
from torch import Tensor

from sae_persona.sae.loss import auxk_loss
from sae_persona.sae.sparsity import BatchTopK, TopK


class Weights(NamedTuple):
    """What is trained; shapes as in SAE."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor


@dataclass(frozen=True)
class Seen:
    """What a step saw. Measures are computed when they are asked for, since few steps are looked at.

    x         [n, d_in]
    d_error   [n, d_in]          (reconstruction - x) * 2 / n
    acts      as SparseLatents
    auxk      []                 the weighted AuxK loss
    """

    x: Tensor
    d_error: Tensor
    acts: Tensor
    auxk: Tensor

    def measures(self) -> dict[str, float]:
        """The loss, AuxK's share of it, FVU, and L0: latents that fire on a token."""
        n = len(self.x)
        squares = self.d_error.square().sum().item() * n * n / 4
        variance = (self.x - self.x.mean(dim=0)).square().sum().item()
        auxk, fires = self.auxk.item(), (self.acts > 0).sum().item()
        return {"loss": squares / n + auxk, "auxk": auxk, "fvu": squares / variance, "l0": fires / n}


class Step:
    """The trained weights, their optimiser and the count of tokens since each latent fired.

    ``weights`` are changed in place: the rows of w_dec have unit norm before and after each call. ``k_aux`` None means
    d_in // 2; the AuxK loss weighs less while fewer latents than that are dead. A latent is dead after ``dead_after``
    tokens without firing.
    """

    def __init__(
        self, weights: Weights, rule: TopK | BatchTopK, *, k_aux: int | None, auxk_coef: float, dead_after: int
    ) -> None:
        self.weights, self.rule = weights, rule
        self.k_aux = weights.w_enc.shape[1] // 2 if k_aux is None else k_aux
        self.auxk_coef, self.dead_after = auxk_coef, dead_after
        self.silent = torch.zeros(len(weights.w_enc), dtype=torch.int64, device=weights.w_enc.device)
        self.optimiser = torch.optim.Adam(weights, fused=True)
        self._pre_acts = weights.w_enc.new_empty(0)

    def __call__(self, x: Tensor, lr: float) -> Seen:
        """Take one step on x [n, d_in] with learning rate ``lr``."""
        seen = self.gradients(x)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        w_dec = self.weights.w_dec
        w_dec.div_(torch.linalg.vector_norm(w_dec, dim=1, keepdim=True))
        return seen

    @property
    def dead(self) -> Tensor:
        """Which latents are dead: [n_latents] bool."""
        return self.silent >= self.dead_after

    def gradients(self, x: Tensor) -> Seen:
        """Set ``.grad`` of all weights for x [n, d_in], and count who fired. No step is taken."""
        w_enc, b_enc, w_dec, b_dec = self.weights
        latents = self.rule.select(torch.addmm(b_enc, x, w_enc.T, out=self._buffer(x)))
        acts, idx = latents.acts.requires_grad_(), latents.idx
        reconstruction = ops.sparse_decode(acts, idx, w_dec, latents.offsets)
        d_error = torch.sub(reconstruction.detach(), x).add_(b_dec).mul_(2 / len(x))
        (d_acts,) = torch.autograd.grad(reconstruction, acts, d_error)
        acts = acts.detach()
        d_acts = d_acts * (acts > 0)

        lists = ops.latent_lists(idx, len(w_enc), latents.offsets)
        w_enc.grad = ops.weight_grad(lists, d_acts, x)
        b_enc.grad = lists.sums(d_acts)
        w_dec.grad = ops.weight_grad(lists, acts, d_error)
        b_dec.grad = d_error.sum(dim=0)
        # the part of a decoder row's gradient along the row, sum of act * d_act, costs no dense product
        w_dec.grad.addcmul_(lists.sums(acts * d_acts)[:, None], w_dec, value=-1)

        auxk = self._auxk_gradients(x, d_error)
        self.silent += len(x)
        self.silent[lists.sums(acts) > 0] = 0
        return Seen(x, d_error, acts, auxk)

    def _auxk_gradients(self, x: Tensor, d_error: Tensor) -> Tensor:
        """Add the gradients of the weighted AuxK loss to those of the dead rows; that loss."""
        dead = self.dead.nonzero().flatten()
        if self.auxk_coef == 0 or self.k_aux == 0 or len(dead) == 0:
            return x.new_zeros(())
        w_enc, b_enc, w_dec = (w[dead].requires_grad_() for w in self.weights[:3])
        pre_acts = torch.nn.functional.linear(x, w_enc, b_enc)
        share = self.auxk_coef * min(1, len(dead) / self.k_aux)
        loss = share * auxk_loss(d_error * (-len(x) / 2), pre_acts, w_dec, min(self.k_aux, len(dead)))
        d_enc, d_b, d_dec = torch.autograd.grad(loss, (w_enc, b_enc, w_dec))
        d_dec -= (d_dec * w_dec).sum(dim=1, keepdim=True) * w_dec.detach()
        for weight, grad in zip(self.weights[:3], (d_enc, d_b, d_dec), strict=True):
            assert weight.grad is not None, "the main loss sets the gradients first"
            weight.grad.index_add_(0, dead, grad)
        return loss.detach()

    def _buffer(self, x: Tensor) -> Tensor:
        """Room for the pre-activations, kept between steps: fresh pages would cost more than the product."""
        if len(self._pre_acts) < len(x):
            self._pre_acts = x.new_empty(len(x), len(self.weights.w_enc))
        return self._pre_acts[: len(x)]
