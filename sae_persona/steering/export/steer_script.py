"""Scripts that need nothing of this package: ``NAME.py`` and its data, ``NAME.safetensors``, beside it.

The script is `steer_template`, as it stands. Its data are the tables of `Rows` by hook point, and in the header's
``edits`` which edit each row belongs to, at which tokens it acts, and the conditions:

    HOOK.enc, HOOK.dec [m, d_in]   HOOK.bias, HOOK.threshold [m]   HOOK.line [m, 4]   HOOK.owner [m] int64
    conditions.I.enc [1, d_in]     conditions.I.bias, conditions.I.threshold [1]
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_persona.activations.lm import LM, VOLATILE
from sae_persona.errors import ConfigError
from sae_persona.runs import write_text, write_whole
from sae_persona.steering.conditions import When
from sae_persona.steering.directions import unit_of
from sae_persona.steering.export import steer_template
from sae_persona.steering.export.additive import check_local
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import LatentEdit, Pin
from sae_persona.steering.positions import Spans
from sae_persona.types import HookPoint

TOOL = "a steering script"


def write(intervention: Intervention, lm: LM, path: Path) -> Path:
    """Write script and data. ConfigError for pins, conditions over a turn and SAEs that must be read whole."""
    tensors, facts = table(intervention, lm, TOOL)
    write_data(path, tensors, facts)
    write_text(path, Path(steer_template.__file__).read_text(encoding="utf-8"))
    return path


def write_data(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the data of the script that will be at ``path``."""
    header = {"edits": json.dumps(facts)}
    write_whole(path.with_suffix(".safetensors"), lambda temporary: save_file(tensors, temporary, header))


def table(intervention: Intervention, lm: LM, tool: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of the data file. ConfigError for what no such table holds."""
    check_local(intervention, tool)
    conditions: dict[int, When] = {}
    for one in intervention.edits:
        if isinstance(one.edit, Pin):
            raise ConfigError(f"{tool} solves for no pins, got latent {one.edit.latent}: clamp it, or --format native")
        if one.when is not None and one.when.scope != "token":
            raise ConfigError(f"{tool} knows conditions at a token, not in a turn: choose --format native")
        if one.when is not None:
            conditions.setdefault(id(one.when), one.when)
    tensors: dict[str, Tensor] = {}
    for i, when in enumerate(conditions.values()):
        tensors |= {f"conditions.{i}.{name}": x for name, x in _condition(intervention, when).items()}
    edits = []
    for hook in intervention.hooks:
        rows = intervention.rows(hook)
        for name in ("enc", "dec", "bias", "threshold", "line", "owner"):
            tensors[f"{hook}.{name}"] = getattr(rows, name).detach().clone().contiguous()
        for one in (one for one in intervention.edits if one.hook == hook):
            positions = one.positions.spans if isinstance(one.positions, Spans) else one.positions
            edits.append(
                {
                    "hook": str(hook),
                    "latent": one.edit.latent if isinstance(one.edit, LatentEdit) else None,
                    "operation": one.edit.name,
                    "positions": positions,
                    "priority": one.priority,
                    "when": None if one.when is None else list(conditions).index(id(one.when)),
                }
            )
    read_at = {when.hook for when in conditions.values() if when.hook is not None}
    hooks: list[HookPoint] = sorted({*intervention.hooks, *read_at}, key=lambda h: (h.layer, h.site == "resid_post"))
    return tensors, {
        "model": lm.name,
        "config": config_facts(lm),
        "blocks": lm.blocks_path,
        "n_layers": lm.n_layers,
        "d_model": lm.d_model,
        "bos_id": lm.bos_id,
        "hooks": [str(hook) for hook in hooks],
        "edits": edits,
        "conditions": [{"hook": str(when.hook), "above": when.above} for when in conditions.values()],
        "approximation": intervention.approximation,
    }


def config_facts(lm: LM) -> dict[str, Any]:
    """What the script knows the model by: the type, and the hash of the config as this transformers writes it."""
    import transformers

    config: Any = lm.model.config
    return {
        "model_type": config.model_type,
        "sha256": lm.config_hash,
        "without": sorted(VOLATILE),
        "transformers": transformers.__version__,
    }


def _condition(intervention: Intervention, when: When) -> dict[str, Tensor]:
    if when.direction is not None:
        unit = unit_of(when.direction.detach().cpu())
        return {"enc": unit[None], "bias": torch.zeros(1), "threshold": torch.full((1,), -math.inf)}
    assert when.hook is not None and when.latent is not None
    rows = intervention.parts[when.hook].rows([when.latent])
    return {
        "enc": rows["w_enc"],
        "bias": rows["b_enc"],
        "threshold": rows.get("threshold", torch.zeros(1)).clamp(min=0),
    }
