"""An SAE in SAELens' layout with the list of features that are edited: ``features.json`` in its folder.

SAELens has no file of interventions: the list says of each feature through which line its activation goes, and whoever
loads the SAE there applies it as x + sum of (target - f) W_dec[feature].
"""

import json
import math
from pathlib import Path
from typing import Any

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError
from sae_persona.runs import write_whole
from sae_persona.sae.formats import CONFIG, hook_metadata, save_sae
from sae_persona.steering.export.additive import INSTEAD
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import LatentEdit, Pin, Placed

TOOL = "an SAELens folder"
FEATURES = "features.json"
HOW = "x + sum of (target - f) * W_dec[feature]; target = min(max(slope * f + shift, low), high); null: no bound"


def write(intervention: Intervention, lm: LM, path: Path) -> Path:
    """Write the SAE and its list.

    ConfigError for edits of directions, under conditions, pins, several hook points, or where only rows of the SAE are
    in hand.
    """
    for one in intervention.edits:
        if not isinstance(one.edit, LatentEdit) or isinstance(one.edit, Pin) or one.when is not None:
            raise ConfigError(
                f"{TOOL} lists latents and their lines, the {one.edit.name} is or waits for more: {INSTEAD}"
            )
    if len(intervention.hooks) > 1:
        raise ConfigError(f"{TOOL} holds one SAE, and the edits act at {len(intervention.hooks)} hook points")
    (hook,) = intervention.hooks
    part = intervention.parts[hook]
    if part.latents is not None:
        raise ConfigError(f"{TOOL} holds a whole SAE, and the file has rows of one: pass the SAE too")
    features = [_feature(one) for one in intervention.edits]
    listed = {**hook_metadata(lm, hook), "how": HOW, "features": features, "approximation": intervention.approximation}

    def fill(temporary: Path) -> None:
        save_sae(part.needed(), temporary)
        (temporary / FEATURES).write_text(json.dumps(listed, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    write_whole(path, fill, mark=CONFIG)
    return path


def _feature(one: Placed) -> dict[str, Any]:
    assert isinstance(one.edit, LatentEdit)
    line = {name: x if math.isfinite(x) else None for name, x in one.edit.line._asdict().items()}
    place = {"positions": str(one.positions), "priority": one.priority}
    return {"feature": one.edit.latent, "operation": one.edit.name, **line, **place}
