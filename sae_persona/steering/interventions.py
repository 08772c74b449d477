"""Interventions as data: what to do with which latent, at which tokens.

A strength is counted in ``unit``: the latent's own 99.9th percentile over its non-zero activations on the measured
corpus, so that 1.0 means "as strongly as it ever fires" on every latent, SAE and model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from sae_persona.errors import ConfigError
from sae_persona.sae.model import SAE

Positions = Literal["answer", "pre", "generated", "all"]
"""answer: the pre-answer token and all after it. pre: the pre-answer token only. generated: all after it.
all: every token. BOS and padding are never edited."""


def _finite(latent: int, *amounts: float) -> None:
    if not all(map(math.isfinite, amounts)):
        raise ConfigError(
            f"an edit of latent {latent} needs finite numbers, got {', '.join(map(str, amounts))}: "
            "a latent that never fired has no percentile to count in"
        )


@dataclass(frozen=True)
class Clamp:
    """Set the latent to ``strength * unit``. No change where the latent has that activation already."""

    latent: int
    strength: float
    unit: float

    def __post_init__(self) -> None:
        _finite(self.latent, self.strength, self.unit)

    def delta(self, acts: Tensor) -> Tensor:
        return self.strength * self.unit - acts


@dataclass(frozen=True)
class Ablate:
    """Set the latent to 0. No change where it does not fire."""

    latent: int

    def delta(self, acts: Tensor) -> Tensor:
        return -acts


@dataclass(frozen=True)
class Scale:
    """Multiply the latent by ``factor``. No change at 1."""

    latent: int
    factor: float

    def __post_init__(self) -> None:
        _finite(self.latent, self.factor)

    def delta(self, acts: Tensor) -> Tensor:
        return (self.factor - 1) * acts


@dataclass(frozen=True)
class Add:
    """Add ``strength * unit`` to the latent, whatever it is. No change at 0."""

    latent: int
    strength: float
    unit: float

    def __post_init__(self) -> None:
        _finite(self.latent, self.strength, self.unit)

    def delta(self, acts: Tensor) -> Tensor:
        return acts.new_full(acts.shape, self.strength * self.unit)


LatentEdit = Clamp | Ablate | Scale | Add
OPERATIONS: dict[str, type[LatentEdit]] = {"clamp": Clamp, "ablate": Ablate, "scale": Scale, "add": Add}


@dataclass(frozen=True, eq=False)
class Steer:
    """Add ``strength * direction`` to the residual stream: the dense baseline. No change at 0.

    direction [d_in], in residual units: a difference of means has strength 1 when added whole.
    """

    direction: Tensor
    strength: float

    def __call__(self, x: Tensor) -> Tensor:
        """[n, d_in] -> [n, d_in] in the dtype of ``x``."""
        moved = x.float() + self.strength * self.direction.to(x.device, dtype=x.float().dtype)
        return x if self.strength == 0 else moved.to(x.dtype)


@dataclass(frozen=True, eq=False)
class LatentEditor:
    """Several latent edits as one map of the residual stream: x + sum_i (c_i - f_i(x)) d_i.

    The encoder is read once, from the unedited x, so the order of the edits does not matter, and what the SAE cannot
    reconstruct (the error term) stays as it is. Source: field-guide of clamping in delta form; equal to
    decode(f with f_i = c_i) + x - decode(f).
    """

    sae: SAE
    edits: tuple[LatentEdit, ...]

    def __post_init__(self) -> None:
        self.sae.check_rebuilds()
        latents = [edit.latent for edit in self.edits]
        if unknown := [i for i in latents if not 0 <= i < self.sae.n_latents]:
            raise ConfigError(f"latent {unknown[0]} does not exist: this SAE has latents 0 to {self.sae.n_latents - 1}")
        if len(set(latents)) < len(latents):
            twice = next(i for i in latents if latents.count(i) > 1)
            raise ConfigError(f"latent {twice} is edited twice: give one edit a latent")

    def __call__(self, x: Tensor) -> Tensor:
        """[n, d_in] -> [n, d_in] in the dtype of ``x``; arithmetic in fp32. Bit-identical where nothing changes."""
        if not self.edits:
            return x
        idx = x.new_tensor([edit.latent for edit in self.edits]).long()
        acts = self.sae.latents_at(x.float(), idx)
        delta = x.new_zeros(acts.shape, dtype=acts.dtype)
        for column, edit in enumerate(self.edits):
            delta[:, column] = edit.delta(acts[:, column])
        moved = (x.float() + delta @ self.sae.directions(idx)).to(x.dtype)
        return moved.where((delta != 0).any(dim=-1, keepdim=True), x)


def check_positions(positions: str) -> None:
    """ConfigError unless it is one of the four."""
    if positions not in get_args(Positions):
        raise ConfigError(f"positions is one of {', '.join(get_args(Positions))}, got {positions!r}")


def parse_edit(text: str, units: Sequence[float]) -> LatentEdit:
    """Read ``clamp:12=1.5``, ``add:12=0.5``, ``scale:12=2`` or ``ablate:12``. ConfigError on anything else.

    units   each latent's 99.9th percentile
    """
    operation, _, rest = text.partition(":")
    latent, _, number = rest.partition("=")
    try:
        index, amount = int(latent), float(number) if number else None
        if operation == "ablate" and amount is None:
            return Ablate(index)
        if operation == "scale" and amount is not None:
            return Scale(index, amount)
        if operation in ("clamp", "add") and amount is not None:
            unit = float(units[index]) if 0 <= index < len(units) else 0.0
            return Clamp(index, amount, unit) if operation == "clamp" else Add(index, amount, unit)
    except ConfigError:
        raise
    except ValueError:
        pass
    raise ConfigError(
        f"an edit reads clamp:LATENT=STRENGTH, add:LATENT=STRENGTH, scale:LATENT=FACTOR or ablate:LATENT, got {text!r}"
    )
