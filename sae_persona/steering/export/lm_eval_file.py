"""Files for lm-evaluation-harness: ``lm_eval --model steered --model_args pretrained=MODEL,steer_path=FILE.pt``.

A dict {module under base_model: {"action", "steering_vector" [d], "steering_coefficient", "bias"}}, of which the action
acts on the module's output, at every token:

    add      x + coefficient * vector
    clamp    the projection on the unit vector becomes the coefficient: a ProjectionClamp here, no clamp of a latent

Its additions all use the vector of the dict's last entry, since they are closures over a loop, so there can be one and
it stands last. One action a module. What is lost in an approximation stands beside, under a key that it does not read.
"""

import pickle
import struct
from pathlib import Path
from typing import Any

import torch

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, FormatError
from sae_persona.runs import write_whole
from sae_persona.steering.directions import dense
from sae_persona.steering.export.additive import INSTEAD, additive, by_layer, check_everywhere, strength_of
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Placed, ProjectionClamp, ProjectOut

TOOL = "an lm-eval steered file"
AMOUNT = "steering_coefficient"
CORRUPT = (
    *(pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, MemoryError, struct.error),
)
"""What torch.load raises on files that are cut or crafted."""
KEYS = ("action", "steering_vector", AMOUNT, "bias")


def write(intervention: Intervention, lm: LM, path: Path) -> Path:
    """Write the edits for `steered`, in the model's dtype.

    ConfigError for what its two actions cannot say: other operations, conditions, some tokens only, two actions of a
    module, two modules that are added to.
    """
    check_everywhere(intervention, TOOL)
    clamped = [one for one in intervention.edits if isinstance(one.edit, ProjectionClamp | ProjectOut)]
    added = Intervention(
        edits=tuple(one for one in intervention.edits if one not in clamped),
        parts=intervention.parts,
        model=intervention.model,
    )
    entries = [_clamp(one) for one in clamped]
    if added.edits:
        layers = by_layer(additive(added, TOOL))
        if len(layers) > 1:
            raise ConfigError(f"{TOOL} can add at one layer, got {len(layers)}: {INSTEAD}")
        for layer, vector in layers.items():  # last: see above
            entries.append((layer, "add", vector, strength_of(vector)))
    at = [layer for layer, *_ in entries]
    if min(at) < 0:
        raise ConfigError(f"{TOOL} acts on outputs of blocks, not on what enters the first: {INSTEAD}")
    if len(set(at)) < len(at):
        raise ConfigError(f"{TOOL} has one action a layer, and the edits want several: {INSTEAD}")
    content: dict[str, Any] = {}
    for layer, action, vector, amount in entries:
        unit = (vector.double() / vector.double().norm()).to(lm.dtype)
        content[_module(lm, layer)] = dict(zip(KEYS, (action, unit, amount, None), strict=True))
    if intervention.approximation is not None:
        content[_module(lm, entries[-1][0])]["approximation"] = dict(intervention.approximation)
    write_whole(path, lambda temporary: torch.save(content, temporary))
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The content of such a file, coefficients as numbers. FormatError if it is anything else."""
    content = load_tensors(path)
    if not isinstance(content, dict) or not content or not all(_is_entry(entry) for entry in content.values()):
        raise FormatError(f"{path} is not an lm-eval steered file: {{module: {{{', '.join(KEYS)}}}}}")
    return {name: {**entry, "steering_coefficient": _number(entry[AMOUNT])} for name, entry in content.items()}


def load_tensors(path: Path) -> Any:
    """What torch.save wrote, of tensors and plain values. FormatError for a missing file, another one, or code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except CORRUPT as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FormatError(f"{path} is no file of plain tensors, and code is not read: {reason}") from error


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and set(KEYS) <= set(entry)
        and isinstance(entry["action"], str)
        and entry["action"] in ("add", "clamp")
        and isinstance(entry["steering_vector"], torch.Tensor)
        and isinstance(entry["bias"], torch.Tensor | None)
        and _number(entry[AMOUNT]) is not None
    )


def _number(value: Any) -> float | None:
    """A number, or a tensor of one; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = None if (whole := dense(value)) is None else whole.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number beyond the largest
        return None


def _clamp(one: Placed) -> tuple[int, str, torch.Tensor, float]:
    assert isinstance(one.edit, ProjectionClamp | ProjectOut) and one.hook is not None
    if len(one.edit.basis) > 1:
        raise ConfigError(f"{TOOL} projects out one direction a layer, got {len(one.edit.basis)}: {INSTEAD}")
    layer = one.hook.layer if one.hook.site == "resid_post" else one.hook.layer - 1
    return layer, "clamp", one.edit.basis[0], one.edit.line.shift


def _module(lm: LM, layer: int) -> str:
    """The block's name under ``base_model``, where the harness looks for it."""
    base = lm.model.base_model  # pyright: ignore
    return next(name for name, module in base.named_modules() if module is lm.blocks[layer])  # pyright: ignore
