"""Interventions from files of any tool: ours, GGUF control vectors, lm-eval files, persona vectors."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, FormatError, ModelError
from sae_persona.steering.apply import SAEs
from sae_persona.steering.directions import dense
from sae_persona.steering.export import control_vector, lm_eval_file
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.export.native import load_intervention
from sae_persona.steering.interventions import DirectionEdit, Placed, ProjectionClamp, Steer
from sae_persona.steering.positions import Positions, Spans
from sae_persona.types import HookPoint


def import_intervention(
    path: str | Path,
    lm: LM,
    *,
    sae: SAEs = None,
    layer: int | None = None,
    strength: float = 1.0,
    positions: Positions | Spans | None = None,
) -> Intervention:
    """Read an intervention for ``lm``, by the ending of its name and by what is in it.

    .json      ours; ``sae`` as `load_intervention`
    .gguf      a control vector of llama.cpp or repeng: direction.N is added to the output of layer N
    .pt        an lm-eval file; or persona vectors [n_layers + 1, d] or [n_layers, d] of all layers, see below
    strength   of vectors, a factor
    positions  of vectors; by default every token, as those tools do

    Persona vectors are rows by layer, of which ``layer`` names one to steer with, counted from 0: it is added to that
    block's output. With n_layers + 1 rows the first is the embeddings', so the output of block L is row L + 1.

    FormatError for other files; ModelError for another model, width or number of layers; ConfigError for a layer or a
    strength that cannot be, or that the file has itself.
    """
    path = Path(path)
    if path.suffix == ".json":
        if strength != 1.0 or layer is not None or positions is not None:
            raise ConfigError(f"{path.name} has its own layers, strengths and positions: leave them away")
        found = load_intervention(path, sae)
        found.model.check(lm)
        return found
    if path.suffix == ".gguf":
        _no_layer(path, layer)
        vectors = control_vector.read(path)
        if (made_for := control_vector.made_for(path, lm.d_model)) is not None:
            made_for.check(lm)
        edits = [(HookPoint(n), Steer(_wide(path, v, lm), strength)) for n, v in vectors.items()]
    elif path.suffix in (".pt", ".pth"):
        content = lm_eval_file.load_tensors(path)
        if isinstance(content, Tensor):
            edits = [_persona_vector(path, _plain(path, content), lm, layer, strength)]
        else:
            _no_layer(path, layer)
            edits = [_lm_eval(path, lm, *entry, strength) for entry in lm_eval_file.read(path).items()]
    else:
        raise FormatError(f"{path.name} ends in no kind that is read: .json, .gguf, .pt")
    return Intervention.of(lm, None, [Placed(edit=e, hook=h, positions=positions or "every") for h, e in edits])


def _persona_vector(
    path: Path, rows: Tensor, lm: LM, layer: int | None, strength: float
) -> tuple[HookPoint, DirectionEdit]:
    if rows.ndim != 2 or len(rows) not in (lm.n_layers, lm.n_layers + 1):
        raise ModelError(
            f"{path} holds {list(rows.shape)}, persona vectors of {lm.name} are [{lm.n_layers + 1}, {lm.d_model}]"
        )
    if layer is None or not 0 <= layer < lm.n_layers:
        raise ConfigError(f"{path.name} has a vector for each layer: give --layer, 0 to {lm.n_layers - 1}, got {layer}")
    row = rows[layer + len(rows) - lm.n_layers]
    return HookPoint(layer), Steer(_wide(path, row, lm), strength)


def _lm_eval(
    path: Path, lm: LM, module: str, entry: dict[str, Any], strength: float
) -> tuple[HookPoint, DirectionEdit]:
    vector, amount = _wide(path, entry["steering_vector"], lm), entry["steering_coefficient"]
    base = dict(lm.model.base_model.named_modules())  # pyright: ignore
    layers = [i for i, block in enumerate(lm.blocks) if base.get(module) is block]
    if not layers:
        raise ModelError(f"{path} edits {module}, which is no block of {lm.name}: only outputs of blocks are read")
    if entry["action"] == "add":
        return HookPoint(layers[0]), Steer(vector, amount * strength)
    if strength != 1.0:
        raise ConfigError(f"{path.name} sets a projection, which has no strength: leave --strength away")
    if entry["bias"] is not None:  # it is of x - bias that the projection is set
        unit = vector.double() / vector.double().norm()
        amount += float(_wide(path, entry["bias"], lm).double() @ unit)
    return HookPoint(layers[0]), ProjectionClamp(vector, amount)


def _plain(path: Path, x: Any) -> Tensor:
    tensor = dense(x)
    if tensor is None:
        raise FormatError(f"{path} has a {type(x).__name__} that is no dense tensor of real numbers: save it as one")
    return tensor


def _wide(path: Path, vector: Any, lm: LM) -> Tensor:
    vector = _plain(path, vector)
    if vector.shape != (lm.d_model,):
        raise ModelError(f"{path} has vectors {list(vector.shape)}, {lm.name} has width {lm.d_model}: load its model")
    if not torch.isfinite(vector).all():
        raise FormatError(f"{path} has NaN or infinite values")
    return vector.float()


def _no_layer(path: Path, layer: int | None) -> None:
    if layer is not None:
        raise ConfigError(f"{path.name} names its own layers: leave --layer away")
