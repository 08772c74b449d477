"""SAEs as files have them, brought to the form that `SAE` keeps: they read raw activations, decoder rows have norm 1.

What the file's SAE does to its input goes into the weights, and reconstructions stay what they were:

    it encodes x - b_dec            b_enc - w_enc b_dec
    it encodes x s                  w_enc s,  w_dec / s,  b_dec / s
    it encodes (x - mean) M         w_enc M^T,  b_enc - w_enc M^T mean;  w_dec M^-1,  b_dec M^-1 + mean
    a gate beside a magnitude       JumpReLU of the magnitude, with the threshold at which the gate opens
    rows of w_dec of norm r         w_enc r,  b_enc r,  threshold r,  w_dec / r: activations are r times theirs

All of it in fp64, rounded once to fp32. What no weights can hold is a normalisation by each token's own mean or norm
(layer norm, rescaling to a constant norm): there a latent's unit would be another length on every token, and the
directions, clamps and thresholds of this package count on it being one. Readers refuse such files.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Rule, Threshold, TopK

ROUNDING = 8 * torch.finfo(torch.float32).eps  # a row normalised in fp32 is off by half of it at width 16384


@dataclass(frozen=True, eq=False)
class RawSAE:
    """Weights as read, in any float type, on the way to an `SAE`.

    w_enc, b_enc   [n_latents, d_in], [n_latents]
    w_dec, b_dec   [n_latents, d_out], [d_out]
    k              of a TopK rule; threshold [n_latents] of a Threshold; neither for ReLU
    transcodes, w_skip   as in `SAE`
    """

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    k: int | None = None
    threshold: Tensor | None = None
    transcodes: bool = False
    w_skip: Tensor | None = None

    def centred(self) -> Self:
        """The same SAE, of one that encodes x - b_dec."""
        shift = self.w_enc.double() @ self.b_dec.double()
        return replace(self, b_enc=self.b_enc.double() - shift)

    def scaled(self, factor: float) -> Self:
        """The same SAE, of one whose input was multiplied by ``factor``, and its output divided by it."""
        w_enc, w_dec, b_dec = self.w_enc.double() * factor, self.w_dec.double() / factor, self.b_dec.double() / factor
        return replace(self, w_enc=w_enc, w_dec=w_dec, b_dec=b_dec)

    def whitened(self, mean: Tensor, matrix: Tensor, inverse: Tensor) -> Self:
        """The same SAE, of one that read z = (x - mean) @ matrix, and whose output went through z @ inverse + mean.

        mean [d_in]; matrix and its inverse [d_in, d_in].
        """
        mean, matrix, inverse = mean.double(), matrix.double(), inverse.double()
        w_enc = self.w_enc.double() @ matrix.T
        w_dec, b_dec = self.w_dec.double() @ inverse, self.b_dec.double() @ inverse + mean
        return replace(self, w_enc=w_enc, b_enc=self.b_enc.double() - w_enc @ mean, w_dec=w_dec, b_dec=b_dec)

    def unit_rows(self) -> Self:
        """Decoder rows of norm 1. Nothing changes, to the bit, where all have it within fp32 rounding."""
        norms = self._norms()
        if _alike(norms, 1.0):
            return self
        w_enc, w_dec = self.w_enc.double() * norms[:, None], self.w_dec.double() / norms[:, None]
        threshold = None if self.threshold is None else self.threshold.double() * norms
        return replace(self, w_enc=w_enc, b_enc=self.b_enc.double() * norms, w_dec=w_dec, threshold=threshold)

    def finished(self, metadata: dict[str, Any]) -> SAE:
        """As `SAE`, in fp32. Rows keep their norms only where they differ under TopK: there they decide who fires."""
        norms = self._norms()
        raw = self if self.k is not None and not _alike(norms, norms[0].item()) else self.unit_rows()
        rule: Rule = ReLU()
        if raw.k is not None:
            rule = TopK(raw.k)
        elif raw.threshold is not None:
            rule = Threshold(raw.threshold.float())
        w_enc, b_enc, w_dec, b_dec = (t.float() for t in (raw.w_enc, raw.b_enc, raw.w_dec, raw.b_dec))
        w_skip = None if raw.w_skip is None else raw.w_skip.float()
        return SAE(w_enc, b_enc, w_dec, b_dec, rule, metadata, transcodes=raw.transcodes, w_skip=w_skip)

    def _norms(self) -> Tensor:
        # a row of zeros stays one
        return torch.linalg.vector_norm(self.w_dec, dim=1, dtype=torch.float64).clamp(min=1e-8)


def gated(w_enc: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor, w_dec: Tensor, b_dec: Tensor) -> RawSAE:
    """A gated SAE as a JumpReLU one, which it equals.

        gate   w_enc z + b_gate > 0          magnitude   exp(r_mag) w_enc z + b_mag,  if positive

    Both are affine in the same w_enc z, so the gate is open exactly where the magnitude is above
    b_mag - exp(r_mag) b_gate. Rajamanoharan et al., 2024 (2404.16014), who tie the two so.
    """
    growth = r_mag.double().exp()
    threshold = b_mag.double() - growth * b_gate.double()
    return RawSAE(w_enc.double() * growth[:, None], b_mag, w_dec, b_dec, threshold=threshold)


def _alike(norms: Tensor, wanted: float) -> bool:
    return bool(((norms / wanted - 1).abs() <= ROUNDING).all())
