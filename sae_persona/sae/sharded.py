"""An SAE whose latents lie on several ranks, at inference: what one rank would find, to the bit where rows are read.

Every rank runs the whole model on the same batch and holds a block of the dictionary, as in training.
"""

from typing import Any

import torch
from torch import Tensor

from sae_persona.sae.model import SAE, LatentRows
from sae_persona.sae.shard import Shard
from sae_persona.sae.sparsity import Threshold, TopK
from sae_persona.types import SparseLatents


class ShardedSAE(SAE):
    """One rank's block of an SAE. Every method is a collective: all ranks call it with the same arguments."""

    def __init__(self, whole: SAE, shard: Shard) -> None:
        rule = whole.rule
        if isinstance(rule, Threshold):
            rule = Threshold(shard.block(rule.threshold))
        whole.check_rebuilds()
        w_enc, b_enc, w_dec = (shard.block(w) for w in (whole.w_enc, whole.b_enc, whole.w_dec))
        super().__init__(w_enc, b_enc, w_dec, whole.b_dec, rule, whole.metadata)
        self.shard, self._n_latents = shard, whole.n_latents

    @property
    def n_latents(self) -> int:
        """Of all ranks."""
        return self._n_latents

    @property
    def fingerprint(self) -> str:
        raise NotImplementedError("a block has no fingerprint: take that of the whole SAE")

    def encode(self, x: Tensor) -> SparseLatents:
        raise NotImplementedError("all latents of all ranks are never in one place: use latents_at")

    def latents_at(self, x: Tensor, idx: Tensor) -> Tensor:
        """As `SAE.latents_at`."""
        self.check_width(x.shape[-1])
        flat = x.reshape(-1, self.d_in)
        acts = flat.new_zeros(len(flat), len(idx))
        mine, own = self._mine(idx)
        if isinstance(self.rule, TopK):
            acts[:, mine] = self._topk(flat, own)
        else:
            acts[:, mine] = self.rule.gate(torch.nn.functional.linear(flat, self.w_enc[own], self.b_enc[own]), own)
        return self.shard.sum(acts).view(*x.shape[:-1], len(idx))

    def _topk(self, x: Tensor, own: Tensor) -> Tensor:
        """Activations of this rank's latents ``own`` [m], under the exact top k of all ranks: [n, m]."""
        assert isinstance(self.rule, TopK)
        k, size = min(self.rule.k, self._n_latents), len(self.b_enc)
        width = min(k, self.shard.most(size))
        found = TopK(min(k, size)).select(torch.nn.functional.linear(x, self.w_enc, self.b_enc))
        kept = self.shard.among_largest(found.acts, k, width=width)
        dense = SparseLatents(found.acts * kept, found.idx).dense(size)
        return dense[:, own]

    def directions(self, idx: Tensor) -> Tensor:
        """As `SAE.directions`."""
        return self.rows(idx).dec

    def rows(self, idx: Tensor) -> LatentRows:
        """As `SAE.rows`, on all ranks."""
        mine, own = self._mine(idx)
        local = super().rows(own)
        found: list[Any] = []
        for part in local:
            everyone = part.new_zeros(len(idx), *part.shape[1:])
            everyone[mine] = part
            found.append(self.shard.sum(everyone))
        return LatentRows(*found)

    def _mine(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """Which of ``idx`` are on this rank, and their numbers here."""
        first, stop = self.shard.bounds(self._n_latents)
        mine = (idx >= first) & (idx < stop)
        return mine, idx[mine] - first
