"""Attribution patching: what setting each latent would do to the metric, for all latents at once, from gradients.

With g the gradient of log p of an answer with respect to the residual stream x, d_i a decoder direction, f_i a
latent's activation and c_i what it is set to; sums over the edited tokens t, then persona's answer minus the other's:

    effect_i      sum_t (g_t . d_i) (c_i - f_it)              Nanda 2023; Syed et al. 2023 (2310.10348)
    integrated_i  sum_t (mean_a g_t(a) . d_i) (0 - f_it)      g(a) at x_t - a sum_j f_jt d_j, a from 0 to 1: the path on
                  which all latents are ablated together. Marks et al. 2024 (2403.19647), after Sundararajan 2017
    delta_i       sum_t (g_t . d_i) ((x_t - xbar) . d_i)      xbar the mean over the edited tokens. Wang et al. 2025
                  (2506.19823), whose g is of the loss, so that their sign is the other one

No [tokens, n_latents] is ever dense: effects are sums over the latents that fire, c_i multiplies a sum of gradients,
and delta_i is the quadratic form d_i' M d_i with M = sum_t g_t (x_t - xbar)'.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.attribution.metrics import Metric, Rows, Side, batches, read_and_grade
from sae_persona.sae.model import SAE
from sae_persona.types import HookPoint, SparseLatents

ENTRIES = 2**22  # numbers gathered at once: 16 MiB in fp32


@dataclass(frozen=True, eq=False)
class Estimates:
    """Means over pairs, [n_latents] fp64 each; effects are in nats, negative where setting the latent costs persona.

    delta   positive where the latent speaks for the persona
    rate    share of the edited tokens on which the latent fires
    size    mean length of its part of the residual stream there, over the tokens on which it fires; 0 if it never does
    """

    effect: Tensor
    integrated: Tensor | None
    delta: Tensor
    rate: Tensor
    size: Tensor


def attribute(
    lm: LM,
    sae: SAE,
    hook: HookPoint,
    sides: Sequence[Side],
    *,
    targets: Tensor | None = None,
    integration: int = 0,
    metric: Metric = "sum",
    batch: int = 32,
) -> Estimates:
    """Estimate the effect of setting each latent, alone, at the sides' edited tokens.

    targets      [n_latents] what each is set to; None: 0, which ablates
    integration  points on the path of ``integrated``; 0 leaves it out, as do ``targets``

    DataError if a gradient is not finite, ModelError for another width.
    """
    sae.check_width(lm.d_model)
    sums = _Sums(sae, lm.device)
    for rows in batches(lm, sides, batch):
        x, g = read_and_grade(lm, hook, rows, metric)
        sign = torch.tensor([float(side.sign) for side in rows.sides], device=x.device)[rows.row]
        g *= sign[:, None]
        latents = sae.encode(x)
        sums.add(x, g, latents)
        if integration and targets is None:
            sums.integrated += _along(sae, latents, _path_gradient(lm, sae, hook, rows, latents, integration, metric))
            sums.paths = True
    return sums.estimates(len(sides) / 2, targets)


class _Sums:
    """What adds up over batches."""

    def __init__(self, sae: SAE, device: torch.device) -> None:
        self.sae = sae
        self.effect, self.integrated, self.fired, self.total = (
            torch.zeros(sae.n_latents, dtype=torch.float64, device=device) for _ in range(4)
        )
        self.product = torch.zeros(sae.d_in, sae.d_in, dtype=torch.float64, device=device)
        self.g, self.x = (torch.zeros(sae.d_in, dtype=torch.float64, device=device) for _ in range(2))
        self.n, self.paths = 0, False

    def add(self, x: Tensor, g: Tensor, latents: SparseLatents) -> None:
        """Edited tokens of a batch: x and the signed gradient g [n, d_in]."""
        self.effect += _along(self.sae, latents, g)
        idx, acts = latents.idx.flatten(), latents.acts.flatten().double()
        self.fired.index_add_(0, idx, (acts > 0).double())
        self.total.index_add_(0, idx, acts)
        self.product += g.double().T @ x.double()
        self.g += g.sum(0, dtype=torch.float64)
        self.x += x.sum(0, dtype=torch.float64)
        self.n += len(x)

    def estimates(self, n_pairs: float, targets: Tensor | None) -> Estimates:
        centred = (self.product - torch.outer(self.g, self.x / self.n)).float()
        delta, slope = [], []
        for d in self.sae.w_dec.split(max(1, ENTRIES // self.sae.d_in)):
            delta.append(((d @ centred) * d).sum(1).double())
            slope.append(d.double() @ self.g)
        effect = self.effect if targets is None else self.effect + targets.to(self.g) * torch.cat(slope)
        length = self.sae.w_dec.norm(dim=1).double()
        return Estimates(
            effect=(effect / n_pairs).cpu(),
            integrated=(self.integrated / n_pairs).cpu() if self.paths else None,
            delta=(torch.cat(delta) / n_pairs).cpu(),
            rate=(self.fired / self.n).cpu(),
            size=(self.total / self.fired.clamp(min=1) * length).cpu(),
        )


def _along(sae: SAE, latents: SparseLatents, g: Tensor) -> Tensor:
    """sum_t (g_t . d_i) (0 - f_it) over the tokens of ``latents``: [n_latents] fp64."""
    token, idx, acts = latents.token, latents.idx.flatten(), latents.acts.flatten()
    found = g.new_zeros(sae.n_latents, dtype=torch.float64)
    for part in torch.arange(len(idx), device=idx.device).split(max(1, ENTRIES // sae.d_in)):
        slope = (g[token[part]] * sae.w_dec[idx[part]]).sum(1)
        found.index_add_(0, idx[part], -(slope * acts[part]).double())
    return found


def _path_gradient(
    lm: LM, sae: SAE, hook: HookPoint, rows: Rows, latents: SparseLatents, steps: int, metric: Metric
) -> Tensor:
    """The signed gradient, averaged over the midpoints of the path to no latent at all: [n_edited, d_in]."""
    part = sae.decode(latents) - sae.b_dec
    sign = torch.tensor([float(side.sign) for side in rows.sides], device=part.device)[rows.row]
    total = torch.zeros_like(part)
    for step in range(steps):
        share = (step + 0.5) / steps

        def change(x: Tensor, share: float = share) -> Tensor:
            moved = x.clone()
            moved[rows.row, rows.position] -= (share * part).to(x.dtype)
            return moved

        total += read_and_grade(lm, hook, rows, metric, change)[1]
    return total / steps * sign[:, None]
