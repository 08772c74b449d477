"""What tools without conditions and positions can do: the same at every token, by adding a constant or through rows.

An edit that adds, of a latent or a direction, adds a constant vector, whatever the stream and the sparsity rule:
target - f = shift. All others depend on what they read.
"""

import math

import torch
from torch import Tensor

from sae_persona.errors import ConfigError
from sae_persona.steering.export.intervention import Intervention, needs_all
from sae_persona.steering.interventions import Add, LatentEdit, Placed, Steer
from sae_persona.steering.rows import wins
from sae_persona.types import HookPoint

INSTEAD = "choose --format native, or fold it into a direction by --approximate"
EMBEDDINGS = -1
"""The layer whose output is what enters the first block."""


def check_everywhere(intervention: Intervention, tool: str) -> None:
    """ConfigError unless every edit acts at every token, BOS too, without a condition."""
    for one in intervention.edits:
        if one.when is not None:
            raise ConfigError(f"{tool} knows no conditions, and the {_name(one)} waits for one: {INSTEAD}")
        everywhere = one.positions == "every" or (one.positions == "all" and intervention.model.bos_id is None)
        if not everywhere:
            raise ConfigError(
                f"{tool} edits every token, BOS too, and the {_name(one)} acts at {one.positions}: "
                f"give it positions every, {INSTEAD}"
            )


def check_local(intervention: Intervention, tool: str) -> None:
    """ConfigError where an edit needs the whole encoder."""
    for hook, part in intervention.parts.items():
        if needs_all(part):
            raise ConfigError(
                f"{tool} holds the rows of the edited latents, and those at {hook} depend on all others ({part.rule}): "
                "choose --format native"
            )


def additive(intervention: Intervention, tool: str) -> dict[HookPoint, Tensor]:
    """What is added at each hook point: [d_model] fp32.

    tool   who wants it, for messages

    ConfigError for edits that wait for a condition, act at some tokens only, or are no sum.
    """
    check_everywhere(intervention, tool)
    for one in intervention.edits:
        if not isinstance(one.edit, Add | Steer):
            raise ConfigError(
                f"{tool} can only add, and what the {_name(one)} adds depends on the stream that it reads: {INSTEAD}"
            )
    found = {}
    for hook in intervention.hooks:
        rows = intervention.rows(hook)
        on = wins(rows.edits, torch.ones(1, len(rows.edits), dtype=torch.bool))[0, rows.owner]
        found[hook] = ((rows.line[:, 1] * on).double() @ rows.dec.double()).float()
    return found


def by_layer(vectors: dict[HookPoint, Tensor]) -> dict[int, Tensor]:
    """The same by the layer to whose output it is added; what enters a block is the output of the one before."""
    found: dict[int, Tensor] = {}
    for hook, vector in vectors.items():
        layer = hook.layer if hook.site == "resid_post" else hook.layer - 1
        found[layer] = found[layer] + vector if layer in found else vector
    return dict(sorted(found.items()))


def only_layer(vectors: dict[HookPoint, Tensor], tool: str) -> tuple[int, Tensor]:
    """The layer and what is added there. ConfigError for several."""
    layers = by_layer(vectors)
    if len(layers) > 1:
        raise ConfigError(f"{tool} holds one vector, and the edits act at {len(layers)} layers: export one at a time")
    return next(iter(layers.items()))


def strength_of(vector: Tensor) -> float:
    """Its norm, for messages and scales. ConfigError where nothing is added, or too much for a number."""
    norm = float(vector.double().norm())
    if not 0 < norm < math.inf:
        raise ConfigError(f"what the edits add has norm {norm:g}: give them a strength")
    return norm


def _name(one: Placed) -> str:
    of = f" of latent {one.edit.latent}" if isinstance(one.edit, LatentEdit) else ""
    return f"{one.edit.name}{of}"
