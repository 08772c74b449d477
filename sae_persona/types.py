"""Values that pass between stages.

Letters in shapes: n tokens (batch and position flattened), k kept latents, b sequences, t positions.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor

from sae_persona.errors import ConfigError

Site = Literal["resid_pre", "resid_post"]


@dataclass(frozen=True, order=True)
class HookPoint:
    """A named place in the residual stream, written ``layers.12.resid_post``.

    Layers count from 0. ``resid_post`` is the output of the block: the output of block 12 is Hugging Face's
    ``hidden_states[13]``. ``resid_pre`` is what enters the block.
    """

    layer: int
    site: Site = "resid_post"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``layers.12.resid_post``, ``layers.12`` or ``12``. ConfigError on anything else."""
        match = re.fullmatch(r"(?:layers\.)?(\d+)(?:\.(resid_pre|resid_post))?", text)
        if match is None:
            raise ConfigError(f"a hook point reads layers.LAYER.resid_post or layers.LAYER.resid_pre, got {text!r}")
        return cls(int(match[1]), match[2] or "resid_post")  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.site}"


@dataclass(frozen=True)
class SparseLatents:
    """The latents that fire on each of n tokens, without the zeros.

    acts     [n, k] or [nnz]   activations, > 0 (0 where a token has fewer than k)
    idx      as acts, int64    which latent each activation belongs to
    offsets  None or [n + 1]   None: k a token. Else CSR: token i owns entries offsets[i] to offsets[i + 1]
    """

    acts: Tensor
    idx: Tensor
    offsets: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of tokens."""
        return len(self.acts) if self.offsets is None else len(self.offsets) - 1

    @property
    def token(self) -> Tensor:
        """The token of each entry, flattened like ``acts``: [nnz] int64."""
        if self.offsets is None:
            return torch.arange(len(self.acts), device=self.acts.device).repeat_interleave(self.acts.shape[1])
        counts = self.offsets.diff()
        return torch.arange(len(counts), device=self.acts.device).repeat_interleave(counts)

    def l0(self) -> Tensor:
        """Number of latents that fire on each token: [n] int64."""
        fires = (self.acts > 0).flatten().long()
        return fires.new_zeros(self.n).index_add_(0, self.token, fires)

    def dense(self, n_latents: int) -> Tensor:
        """[n, n_latents], zeros included: for tests and small problems only."""
        full = self.acts.new_zeros(self.n, n_latents)
        return full.index_put_((self.token, self.idx.flatten()), self.acts.flatten(), accumulate=True)


@dataclass(frozen=True)
class State:
    """Where something that goes on stands: enough to go on from there to the bit. What checkpoints are made of.

    tensors   by name, on any device
    numbers   JSON values by name
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def under(self, prefix: str) -> "State":
        """The same with a prefix before every name."""
        return State(
            {prefix + name: x for name, x in self.tensors.items()},
            {prefix + name: x for name, x in self.numbers.items()},
        )

    def of(self, prefix: str) -> "State":
        """What `under` has put under the prefix."""
        cut = len(prefix)
        return State(
            {name[cut:]: x for name, x in self.tensors.items() if name.startswith(prefix)},
            {name[cut:]: x for name, x in self.numbers.items() if name.startswith(prefix)},
        )

    def joined(self, other: "State") -> "State":
        """Both, which have no name in common."""
        return State({**self.tensors, **other.tensors}, {**self.numbers, **other.numbers})
