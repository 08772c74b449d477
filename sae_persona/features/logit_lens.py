"""Which tokens each latent's direction makes likelier and less likely, read through the unembedding alone.

The logit lens (nostalgebraist, 2020) of a decoder direction: what it does to the logits if no later block changes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.errors import ModelError
from sae_persona.features.unembedding import Unembedding, find_unembedding
from sae_persona.sae.model import SAE

ENTRIES = 2**25  # logits held at once: 128 MiB


@dataclass(frozen=True, eq=False)
class LensTokens:
    """For n latents, the tokens at either end of the lens, the strongest first.

    promoted, suppressed                 [n, count] int64   token ids
    promoted_logits, suppressed_logits   [n, count] fp32    their logits, or z-scores
    """

    promoted: Tensor
    promoted_logits: Tensor
    suppressed: Tensor
    suppressed_logits: Tensor


class LogitLens:
    """The logit lens of one SAE on one model. ModelError if the model has none, or the SAE is a transcoder."""

    def __init__(self, lm: LM, sae: SAE) -> None:
        sae.check_rebuilds()
        sae.check_width(lm.d_model)
        self.sae = sae
        self.unembedding: Unembedding = find_unembedding(lm)
        self._moments: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def logits(self, latents: Tensor, *, z_scored: bool = False) -> Tensor:
        """[n] int64 -> [n, n_tokens] fp32: the logits of each latent's unit direction (see `Unembedding.logits`).

        z_scored   each token's logits in standard deviations from their mean over all latents of the SAE, so that
                   tokens which every direction moves far do not fill every list
        """
        logits = self.unembedding.logits(self.sae.directions(latents.to(self.sae.w_dec.device)))
        if not z_scored:
            return logits
        mean, deviation = self._over_latents()
        return (logits - mean) / deviation

    def tokens(self, latents: Tensor, count: int, *, z_scored: bool = False) -> LensTokens:
        """The ``count`` tokens at either end of each latent's lens, in blocks of latents; all of them, if fewer."""
        count, rows = min(count, self.unembedding.n_tokens), max(1, ENTRIES // self.unembedding.n_tokens)
        parts: list[tuple[Tensor, ...]] = []
        for block in latents.split(rows):
            logits = self.logits(block, z_scored=z_scored)
            high, low = logits.topk(count), logits.topk(count, largest=False)
            parts.append((high.indices.cpu(), high.values.cpu(), low.indices.cpu(), low.values.cpu()))
        if not parts:
            none, ids = torch.empty(0, count), torch.empty(0, count, dtype=torch.int64)
            return LensTokens(ids, none, ids, none)
        return LensTokens(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _over_latents(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each token's logit over all latents: [n_tokens] each.

        From the directions' covariance, W C W^T on its diagonal, so that no pass over latents times tokens is needed.
        """
        if self._moments is None:
            folded = self.unembedding.fold(self.sae.w_dec)
            weight = self.unembedding.weight.float()
            off = folded - folded.mean(0)
            variance = ((weight @ (off.T @ off / len(off))) * weight).sum(1)
            if not (variance > 0).all():
                raise ModelError("z-scores need latents whose directions differ: this SAE has one direction only")
            self._moments = weight @ folded.mean(0), variance.sqrt()
        return self._moments
