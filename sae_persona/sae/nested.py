"""Losses of several reconstructions of a batch, each of which holds all of the one before and some more entries.

Prefixes of a Matryoshka dictionary are such (an entry is in all that reach its latent), and so is Multi-TopK (the k
largest of each token, and the 4 k largest). With reconstruction m of M made of the entries of groups 0 to m:

loss = sum over m of weight[m] * mean over tokens of |error_m|^2
pull_g = sum over m >= g of weight[m] * d_error_m        what each entry of group g is pulled by
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from sae_kernels import ops
from torch import Tensor

from sae_persona.sae.sparsity import TopK
from sae_persona.types import SparseLatents

WIDER = 4  # times k are the entries of Multi-TopK's second reconstruction
WIDER_WEIGHT = 1 / 8  # of its loss


@dataclass(frozen=True)
class Groups:
    """Which group each entry is in.

    of        as acts, int64; None: all are in the only one
    weights   of the losses, one a group
    main      the reconstruction that is the SAE's own: measures and AuxK mean it, and what it is made of fires
    """

    of: Tensor | None = None
    weights: tuple[float, ...] = (1.0,)
    main: int = 0

    def own(self, acts: Tensor) -> Tensor:
        """The activations, 0 where an entry is not in the SAE's own reconstruction."""
        return acts if self.of is None else acts * (self.of <= self.main)

    def split(self, latents: SparseLatents) -> list[SparseLatents]:
        """The entries of each group."""
        if self.of is None:
            return [latents]
        idx, acts, of = latents.idx.flatten(), latents.acts.flatten(), self.of.flatten()
        offsets = latents.offsets
        if offsets is None:
            offsets = torch.arange(latents.n + 1, device=idx.device) * latents.idx.shape[1]
        parts = []
        for group in range(len(self.weights)):
            inside = of == group
            before = torch.nn.functional.pad(inside.cumsum(0), (1, 0))  # entries of the group before each entry
            parts.append(SparseLatents(acts[inside], idx[inside], before[offsets]))
        return parts

    def pulls(self, d_errors: Sequence[Tensor]) -> list[Tensor]:
        """What each group's entries are pulled by, [n, d_in] each, from the gradient of each reconstruction."""
        if self.of is None:
            return [*d_errors]
        weighed = [d * weight for d, weight in zip(d_errors, self.weights, strict=True)]
        return [*accumulate(reversed(weighed))][::-1]

    def decoder_gradient(self, lists: ops.LatentLists, acts: Tensor, pulls: Sequence[Tensor]) -> Tensor:
        """Sum of act * pull over each latent's entries: [n_latents, d_in]."""
        if self.of is None:
            return ops.weight_grad(lists, acts, pulls[0])
        # the pulls under each other, so that an entry of group g reads row g * n + token
        row = lists.token + self.of.flatten()[lists.entry] * len(pulls[0])
        return ops.weight_grad(ops.LatentLists(lists.entry, row, lists.offsets), acts, torch.cat([*pulls]))

    def loss(self, d_errors: Sequence[Tensor]) -> Tensor | None:
        """The weighted squared errors a token; None if there is only one reconstruction, which needs no sum yet."""
        if self.of is None:
            return None
        squares = (weight * d.square().sum() for d, weight in zip(d_errors, self.weights, strict=True))
        return torch.stack([*squares]).sum() * (len(d_errors[0]) / 4)


def by_prefix(idx: Tensor, prefixes: Tensor) -> Groups:
    """Groups of nested dictionaries of sizes ``prefixes`` [M], which rise to n_latents. All weigh 1 / M: 2503.17547."""
    last = len(prefixes) - 1
    return Groups(torch.bucketize(idx, prefixes, right=True), (1 / (last + 1),) * (last + 1), last)


def wider(rule: TopK, pre_acts: Tensor) -> tuple[SparseLatents, Groups]:
    """The 4 k largest of each token, in a second group all but the k largest: L(k) + L(4k) / 8, 2406.04093 5.3."""
    found = TopK(min(WIDER * rule.k, pre_acts.shape[1])).select(pre_acts)
    idx, order = found.idx.sort(dim=1)  # so that of equal values the lowest index comes first, as where k are selected
    acts = found.acts.gather(1, order)
    of = torch.ones_like(idx).scatter_(1, rule.select(acts).idx, 0)
    return SparseLatents(acts, idx), Groups(of, (1.0, WIDER_WEIGHT))
