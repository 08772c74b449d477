"""What a step on a GPU saw, and what of it is measured when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sae_kernels.values import LOSS, Entries
from torch import Tensor

from sae_persona.errors import RunError
from sae_persona.sae.sparsity import JumpReLU, TrainingRule

if TYPE_CHECKING:  # which makes them
    from sae_persona.sae.kernel_step import KernelStep

ROWS = 1024  # of a tensor that is looked at in fp32 at once


@dataclass(frozen=True)
class KernelSeen:
    """What a step saw, on the device until it is asked for. The next step overwrites it.

    rule       as it was, with the k of the step
    z [n, d]   whole [blocks, n]: parts of the squared errors of the whole dictionary   entries: what fired
    left       None or [n, d]: what AuxK left of the error
    full       None or [1]: ranks that had no room for all that fires on theirs
    """

    step: KernelStep
    rule: TrainingRule
    z: Tensor
    whole: Tensor
    entries: Entries
    left: Tensor | None
    full: Tensor | None = None

    def measures(self) -> dict[str, float]:
        """As `Seen.measures`; with fp8 also its recall. RunError if more latents fired than there was room for."""
        step, n = self.step, len(self.z)
        loss = float(step.scalars[LOSS])
        shares = {"auxk": 0.0 if self.left is None else step.auxk_share(self.left)}
        fires = int(self._fires().sum())
        if isinstance(self.rule, JumpReLU):
            assert self.entries.active is not None, "JumpReLU counts active latents"
            l0 = int(self.entries.active.sum()) / n
            if self._is_full():
                raise RunError(f"{l0:.0f} latents fire on a token, more than there is room for: raise spare, or k")
            shares["sparsity"] = float(self.rule.loss(torch.tensor(l0)))
        found = {"loss": loss + sum(shares.values()), **shares, "fvu": float(self.whole.sum()) / _variance(self.z)}
        found["l0"] = fires / n
        if step.recall is not None:
            found["recall"] = step.recall
        return found

    def _fires(self) -> Tensor:
        """Parts of the number of latents that fire, on all ranks."""
        if self.step.shard.world == 1:
            return self.entries.acts > 0
        assert self.entries.active is not None, "ranks tell each other how many fire"
        return self.entries.active

    def _is_full(self) -> bool:
        """Whether there was no room for some entries, on any rank."""
        if self.full is None:
            return int(self.entries.offsets[-1]) == len(self.entries.acts)
        return bool(self.full)


def _variance(z: Tensor) -> float:
    """Squared distance of the rows [n, d] from their mean, summed; in parts, since a copy in fp32 may not fit."""
    total = torch.stack([part.double().sum(dim=0) for part in z.split(ROWS)]).sum(dim=0)
    squares = sum(float(part.float().square().sum(dtype=torch.float64)) for part in z.split(ROWS))
    return squares - float(total.square().sum()) / len(z)
