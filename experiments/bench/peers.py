"""Training steps of others, and the plain PyTorch one that they start from; each for TopK without dead latents."""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_persona.sae.step import Weights

PEERS = ("plain_dense", "sae_lens")


def missing(name: str) -> str | None:
    """Why a peer cannot be measured here; None if it can."""
    if name == "sae_lens" and find_spec("sae_lens") is None:
        return "it could not be installed on this machine"
    return None


class PlainDense:
    """Plain PyTorch: bf16 autocast over fp32 weights, dense top-k, decode and gradients, unit rows, fused Adam.

    It does not clip, in its favour.
    """

    def __init__(self, weights: Weights, k: int) -> None:
        self.weights, self.k = weights, k
        for w in weights:
            w.requires_grad_()
        self.optimiser = torch.optim.Adam(weights, fused=True)

    def __call__(self, x: Tensor, lr: float) -> Tensor:
        """The loss, on the device."""
        w_enc, b_enc, w_dec, b_dec = self.weights
        with torch.autocast(x.device.type, torch.bfloat16):
            pre_acts = F.linear(x, w_enc, b_enc)
            values, idx = pre_acts.topk(self.k, dim=1, sorted=False)
            acts = torch.zeros_like(pre_acts, requires_grad=False).scatter_(1, idx, values.relu())
            rebuilt = acts @ w_dec + b_dec
        loss = (rebuilt.float() - x.float()).square().sum(dim=1).mean()
        loss.backward()
        with torch.no_grad():
            w_dec.grad.sub_((w_dec.grad * w_dec).sum(dim=1, keepdim=True) * w_dec)
            self.optimiser.param_groups[0]["lr"] = lr
            self.optimiser.step()
            self.optimiser.zero_grad()
            w_dec.div_(torch.linalg.vector_norm(w_dec, dim=1, keepdim=True))
        return loss.detach()


def saelens(weights: Weights, k: int, *, lr: float, bf16: bool = False) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """SAELens' TopKTrainingSAE with these weights copied in, and a step as in `SAETrainer._train_step`.

    That is the training forward pass, backward, clipping and Adam that is not fused; without its firing statistics
    and GradScaler, in its favour. No latent is dead. ``bf16``: under autocast, which is its option. The step returns
    the loss.
    """
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    n_latents, d_in = weights.w_enc.shape
    device = weights.w_enc.device
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=n_latents, k=k, device=str(device)))
    with torch.no_grad():
        for parameter, value in ((sae.W_enc, weights.w_enc.T), (sae.W_dec, weights.w_dec)):
            parameter.copy_(value)
    optimiser = torch.optim.Adam(sae.parameters(), lr=lr)
    n_batches = 0

    def step(x: Tensor) -> Tensor:
        nonlocal n_batches
        inputs = TrainStepInput(
            sae_in=x.float(),
            coefficients={},
            dead_neuron_mask=torch.zeros(n_latents, dtype=torch.bool, device=device),
            n_training_steps=n_batches,
            is_logging_step=False,
        )
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            output = sae.training_forward_pass(inputs)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        n_batches += 1
        return output.loss.detach()

    return sae, step


def memory(name: str, n_weights: int, n_pre_acts: int) -> float:
    """Bytes that a peer needs, estimated from what was measured (performance.md: 21.7 and 46.6 GB at L)."""
    a_weight, a_pre_act = (18, 6) if name == "plain_dense" else (24, 36)
    return n_weights * a_weight + n_pre_acts * a_pre_act
