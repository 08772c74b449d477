"""A vector for Neuronpedia: the JSON body of ``POST /api/vector/new``. What it adds is strength times vector."""

import math
from pathlib import Path
from typing import Any

from sae_persona.activations.lm import LM
from sae_persona.errors import FormatError
from sae_persona.runs import write_json
from sae_persona.steering.export.additive import EMBEDDINGS, additive, only_layer, strength_of
from sae_persona.steering.export.intervention import Intervention

TOOL = "a Neuronpedia vector"
STRENGTH = 8.0  # a power of two: times the vector it is the addition, to the bit
"""At which its slider stands at first, of -100 to 100; the vector is what the edits add over this."""
MOST = 24_576
KINDS: dict[str, type | tuple[type, ...]] = {
    "modelId": str,
    "layerNumber": int,
    "hookType": str,
    "vector": list,
    "vectorDefaultSteerStrength": (int, float),
    "vectorLabel": str,
}


def write(intervention: Intervention, lm: LM, path: Path) -> Path:
    """Write what the edits add at their one hook point.

    ``modelId`` is the last part of the model's name: change it where Neuronpedia has another. ConfigError for edits
    that are no sum, act at some tokens only or at several layers.
    """
    layer, vector = only_layer(additive(intervention, TOOL), TOOL)
    strength_of(vector)
    label = " + ".join(_words(one.edit) for one in intervention.edits)
    if intervention.approximation is not None:
        lost = intervention.approximation
        said = f"explains {lost['explained']:.2f}, KL {lost['kl']:.3g} nats"
        label += f" (stands for {', '.join(lost['stands_for'])}: {said})"
    raw = {
        "modelId": Path(intervention.model.name).name,
        "layerNumber": max(layer, 0),
        "hookType": "hook_resid_pre" if layer == EMBEDDINGS else "hook_resid_post",
        "vector": (vector.double() / STRENGTH).tolist(),
        "vectorDefaultSteerStrength": STRENGTH,
        "vectorLabel": label,
    }
    check(raw, lm.d_model)
    write_json(path, raw)
    return path


def check(raw: Any, d_model: int) -> None:
    """FormatError unless it is what Neuronpedia takes for a model of that width."""
    if not isinstance(raw, dict) or set(raw) != set(KINDS):
        raise FormatError(f"a Neuronpedia vector has the keys {', '.join(KINDS)}, got {list(raw)}")
    for key, kind in KINDS.items():
        if not isinstance(raw[key], kind) or isinstance(raw[key], bool):
            raise FormatError(f"a Neuronpedia vector's {key} has another type, got {raw[key]!r:.40}")
    if raw["hookType"] not in ("hook_resid_pre", "hook_resid_post") or raw["layerNumber"] < 0:
        raise FormatError(f"a Neuronpedia vector has no place {raw['hookType']!r} of layer {raw['layerNumber']}")
    if len(raw["vector"]) != d_model or d_model > MOST or not all(map(math.isfinite, raw["vector"])):
        raise FormatError(
            f"a Neuronpedia vector has {d_model} finite numbers, at most {MOST}, got {len(raw['vector'])}"
        )
    if not -100 <= raw["vectorDefaultSteerStrength"] <= 100:
        raise FormatError(f"a Neuronpedia strength is from -100 to 100, got {raw['vectorDefaultSteerStrength']}")


def _words(edit: Any) -> str:
    return f"{edit.name} latent {edit.latent} {edit.strength:g}" if hasattr(edit, "latent") else "steer"
