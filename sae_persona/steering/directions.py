"""What a direction in the residual stream must be."""

import math

import torch
from torch import Tensor

from sae_persona.errors import ConfigError


def norm_of(direction: object) -> float:
    """Its length. ConfigError unless it is a vector [d_in] that is finite and not 0."""
    if not isinstance(direction, Tensor) or direction.is_complex():
        raise ConfigError(f"a direction is a tensor [d_in] of real numbers, got {type(direction).__name__}")
    norm = float(direction.double().norm()) if direction.ndim == 1 else math.nan
    if not 0 < norm < math.inf:
        shape = list(direction.shape)
        raise ConfigError(f"a direction is a finite vector [d_in] that is not 0, got {shape} of norm {norm:g}")
    return norm


def unit_of(direction: Tensor) -> Tensor:
    """[d_in] fp32 of norm 1."""
    return (direction.double() / direction.double().norm()).float()


def check_wide(direction: Tensor, d_in: int) -> None:
    """ConfigError unless a direction, or rows of them, has the width of the stream."""
    if direction.shape[-1] != d_in:
        raise ConfigError(f"a direction has as many numbers as the stream, {d_in}, got {direction.shape[-1]}")


def dense(x: object) -> Tensor | None:
    """A tensor of real numbers in plain memory, apart from any graph; None for what a file may hold besides."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested or x.is_quantized or x.is_meta:
        return None
    return None if x.is_complex() else x.detach()
