"""The threshold that an SAE trained with BatchTopK is used with, and how many latents fire under it.

On other activations L0 is off by what the tokens that it was set on happen to be: with the lab's SAE of k 16 after 50
steps by 1.9 % (root mean square of draws) with 2048 tokens, 1.7 % with 4096 and 0.7 % with 8192. That the weights were
trained on the tokens showed less than that; tokens they were not trained on leave nothing to show.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_persona.errors import DataError
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import Threshold, calibrate


@dataclass(frozen=True)
class L0:
    """Latents that fire on a token.

    mean      over the tokens
    spread    standard deviation from token to token
    n_tokens  that were looked at
    """

    mean: float
    spread: float
    n_tokens: int

    def tokens_for(self, share: float) -> int:
        """Tokens to calibrate on, that L0 be off by less than ``share`` of it elsewhere, in 95 of 100 draws.

        Of independent tokens, as shuffled ones nearly are. Those of one text are alike: of few texts it takes more.
        """
        return math.ceil((1.96 * self.spread / (share * self.mean)) ** 2)


def measured_l0(sae: SAE, batches: Iterable[Tensor]) -> L0:
    """L0 over batches [n, d_in]. DataError if there are none."""
    counts = [sae.encode(batch).l0().double() for batch in batches]
    if not counts:
        raise DataError("there is no batch to measure L0 on: give at least one")
    l0 = torch.cat(counts)
    return L0(l0.mean().item(), l0.std(correction=0).item(), len(l0))


@torch.no_grad()
def calibrated(sae: SAE, batches: Sequence[Tensor], k: int) -> SAE:
    """A copy with one threshold for all latents, above which k pre-activations a token lie over the batches [n, d_in].

    Exactly k on average over these, ties aside; near it on others, as `L0.tokens_for` says. The weights are shared.
    ``metadata`` says under ``calibration`` what k and how many tokens it was. DataError if there is no batch.
    """
    if not batches:
        raise DataError("there is no batch to calibrate on: give at least one")
    level = calibrate(sae.pre_acts, batches, k)
    metadata = {**sae.metadata, "calibration": {"k": k, "n_tokens": sum(map(len, batches))}}
    rule = Threshold(torch.full_like(sae.b_enc, level))
    return SAE(sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec, rule, metadata)
