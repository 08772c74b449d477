"""What a step on a GPU keeps between calls: the weights as the kernels want them, and Adam's moments."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from sae_kernels.prepare import FP8
from sae_kernels.split import join, split
from sae_kernels.values import FP8_HEADROOM, FP8_LARGEST, Latents, Rows
from torch import Tensor

from sae_persona.sae.kernel_plan import PAD, KernelConfig, padded
from sae_persona.sae.step import Weights

OUTLIER = 8.0  # times the median root mean square of the dimensions: what e4m3 should not have to hold beside the rest
SIDES = (0, 32, 64)  # outlier dimensions that can be multiplied in bf16


@dataclass(frozen=True)
class KernelState:
    """Weights and moments on the device.

    order   [d_in] int32   the columns of all rows here, as columns of the activations: outliers first
    side    how many of the first columns are multiplied in bf16 where the rest is e4m3
    """

    encoder: Rows
    latents: Latents
    decoder: Rows
    b_dec: Tensor
    b_dec_m: Tensor
    b_dec_v: Tensor
    order: Tensor
    side: int

    @classmethod
    def make(
        cls, weights: Weights, threshold: Tensor | None, config: KernelConfig, device: torch.device, rms: Tensor | None
    ) -> Self:
        """From fp32 weights, wherever they are; ``rms`` [d_in] of the activations tells which columns are outliers."""
        n_latents, d_in = weights.w_enc.shape
        order, side = (
            outliers_first(rms.to(weights.w_enc.device)) if config.precision == "fp8" and rms is not None else (None, 0)
        )
        d = padded(d_in, PAD)
        encoder = _rows(_columns(weights.w_enc, order, d), config, device)
        if config.precision == "fp8":
            encoder = _with_fp8(encoder)
        decoder = _rows(_columns(weights.w_dec, order, d), config, device)
        decoder = replace(decoder, inverse_norm=torch.ones(n_latents, device=device))
        b_dec = _columns(weights.b_dec[None], order, d)[0].clone().to(device)

        def zeros() -> Tensor:
            return torch.zeros(n_latents, device=device)

        moving = {} if threshold is None else {"threshold_m": zeros(), "threshold_v": zeros()}
        silent = torch.zeros(n_latents, dtype=torch.int64, device=device)
        b_enc = weights.b_enc.float().clone().to(device)
        latents = Latents(b_enc, zeros(), zeros(), silent, threshold, **moving)
        columns = torch.arange(d_in, device=device) if order is None else order.to(device)
        moments = torch.zeros_like(b_dec), torch.zeros_like(b_dec)
        return cls(encoder, latents, decoder, b_dec, *moments, columns.int(), side)

    @property
    def weights(self) -> Weights:
        """Copies in fp32, columns in the order of the activations, decoder rows of norm 1."""
        w_enc, w_dec = (
            self._as_given(rows.high if rows.low is None else join(rows.high, rows.low))
            for rows in (self.encoder, self.decoder)
        )
        w_dec.div_(torch.linalg.vector_norm(w_dec, dim=1, keepdim=True))
        return Weights(w_enc, self.latents.b.clone(), w_dec, self._as_given(self.b_dec[None])[0])

    def _as_given(self, w: Tensor) -> Tensor:
        given = torch.empty(len(w), len(self.order), device=w.device)
        given[:, self.order.long()] = w[:, : len(self.order)]
        return given


def outliers_first(rms: Tensor) -> tuple[Tensor | None, int]:
    """An order of the dimensions that begins with the outliers, and how many of its first to treat as such."""
    n_outliers = int((rms > OUTLIER * rms.median()).sum())
    side = next((side for side in SIDES if side >= n_outliers), SIDES[-1])
    return (rms.argsort(descending=True, stable=True), side) if side else (None, 0)


def _columns(w: Tensor, order: Tensor | None, d: int) -> Tensor:
    """fp32 rows in the order, padded by columns of zeros; a copy only where something changes."""
    w = w.detach().float()
    w = w if order is None else w[:, order]
    return w if w.shape[1] == d else torch.nn.functional.pad(w, (0, d - w.shape[1]))


def _rows(w: Tensor, config: KernelConfig, device: torch.device) -> Rows:
    halves = (w.clone().to(device), None) if config.precision == "fp32" else split(w, device)
    dtype = torch.float32 if config.moments == "fp32" else torch.bfloat16
    m, v = (torch.zeros(w.shape, dtype=dtype, device=device) for _ in range(2))
    return Rows(*halves, m, v)


def _with_fp8(rows: Rows) -> Rows:
    """With the e4m3 copy: each row over its own scale."""
    scale = rows.high.abs().amax(dim=1).float().clamp(min=1e-30) / FP8_LARGEST
    fp8 = torch.empty_like(rows.high, dtype=FP8)
    for part, unit, copy in zip(rows.high.split(4096), scale.split(4096), fp8.split(4096), strict=True):
        copy.copy_((part.float() / unit[:, None]).to(FP8))
    return replace(rows, fp8=fp8, fp8_scale=scale, fp8_next=scale * FP8_HEADROOM)
