"""When an edit acts, or a generation stops: a latent or a projection beyond a level, at this token or in this turn."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sae_persona.activations.hooks import Call
from sae_persona.errors import ConfigError
from sae_persona.sae.model import SAE
from sae_persona.steering.directions import norm_of, unit_of
from sae_persona.types import HookPoint

Scope = Literal["token", "turn"]
"""token: where it holds. turn: from the first token of the answer at which it held, the pre-answer token counted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class When:
    """That a latent, or the projection on a direction, is above a level.

    latent      its activation; or
    direction   [d_in], taken as a unit vector: the projection on it
    above       in activation units, or units of the residual stream
    hook        where it is read; None: where the edit acts. It reads the stream before any edit at that hook point

    ConfigError unless there is exactly one of latent and direction, the level is finite and the direction a vector.
    """

    above: float
    latent: int | None = None
    direction: Tensor | None = None
    scope: Scope = "token"
    hook: HookPoint | None = None

    def __post_init__(self) -> None:
        if (self.latent is None) == (self.direction is None):
            raise ConfigError("a condition reads either a latent or a direction: give one of them")
        if not math.isfinite(self.above):
            raise ConfigError(f"a condition needs a finite level, got {self.above}")
        if self.scope not in ("token", "turn"):
            raise ConfigError(f"a condition holds at a token or in a turn, got {self.scope!r}")
        if self.direction is not None:
            norm_of(self.direction)
        if self.latent is not None and self.above < 0:
            raise ConfigError(f"a latent is never below 0, so it is always above {self.above:g}: give a level from 0")

    def level(self, x: Tensor, sae: SAE | None) -> Tensor:
        """What is compared: [..., d_in] -> [...]. ``sae`` is that of the hook point, where a latent is read."""
        if self.direction is not None:
            return x.float() @ unit_of(self.direction).to(x.device)
        assert sae is not None and self.latent is not None
        return sae.latents_at(x.float(), torch.tensor([self.latent], device=x.device))[..., 0]


class Watch:
    """A condition followed through the passes of a generation."""

    def __init__(self, when: When, sae: SAE | None) -> None:
        self.when, self.sae = when, sae
        self._now: Tensor | None = None
        self.so_far: Tensor | None = None  # [b] bool, since the turn began

    def see(self, x: Tensor, call: Call, prompt: Tensor, *, cached: bool) -> None:
        """Read x [b, t, d_in], the unedited stream of a pass; ``prompt`` [b] tokens of each row are its prompt.

        cached   the pass goes on from a cache, and so does the turn
        """
        holds = (self.when.level(x, self.sae) > self.when.above) & call.real
        in_turn = holds & (call.index >= prompt[:, None] - 1)
        if not cached or self.so_far is None or len(self.so_far) != len(holds):
            self.so_far = torch.zeros_like(holds[:, 0])
        running = in_turn.cumsum(dim=1).bool() | self.so_far[:, None]
        self.so_far.copy_(running[:, -1])  # in place, so that a CUDA graph remembers too
        self._now = holds if self.when.scope == "token" else running

    @property
    def holds(self) -> Tensor:
        """At which tokens of the pass now running: [b, t] bool."""
        assert self._now is not None, "it is read where or before it is used"
        return self._now
