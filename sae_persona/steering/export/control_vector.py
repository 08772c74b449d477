"""GGUF control vectors, as llama.cpp and repeng read them: ``direction.N`` is added to the output of layer N, from 0.

llama.cpp refuses the whole file for a direction of layer 0, a tensor of another name, type or rank, so all else that is
said stands in keys:

    general.architecture        controlvector
    controlvector.model_hint    the model's type, which repeng asks for
    controlvector.layer_count   number of directions
    sae_persona.model, .config_hash, .approximation   what it was made for, and what is lost, as JSON
    direction.N                 F32 [d_model], N >= 1
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, FormatError
from sae_persona.runs import write_whole
from sae_persona.steering.export.additive import additive, by_layer
from sae_persona.steering.export.intervention import Intervention, MadeFor

ARCHITECTURE = "controlvector"
TOOL = "a control vector"
READ = ("general.architecture", "sae_persona.model", "sae_persona.config_hash")
CORRUPT = (OSError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, MemoryError)
"""What gguf raises on files that are cut or crafted."""


def write(intervention: Intervention, lm: LM, path: Path) -> Path:
    """Write what the edits add as a control vector, and read it back.

    ConfigError for edits that are no sum, act at some tokens only, or before layer 1; or where gguf is not installed.
    """
    layers = by_layer(additive(intervention, TOOL))
    if min(layers) < 1:
        raise ConfigError(f"{TOOL} acts after layer 1 at the earliest, got {min(layers)}: choose another layer")

    def fill(temporary: Path) -> None:
        _write(temporary, layers, _type_of(lm), intervention)
        found = read(temporary)
        if list(found) != list(layers) or any(not torch.equal(found[i], layers[i]) for i in layers):
            raise FormatError(f"gguf did not read back what was written to {path}: please report this")

    _package()
    write_whole(path, fill)
    return path


def read(path: Path) -> dict[int, Tensor]:
    """What is added to the output of each layer: [d_model] fp32. FormatError for a file that is no control vector."""
    gguf, (reader, said) = _package(), _open(path)
    if said["general.architecture"] != ARCHITECTURE:
        raise FormatError(f"{path} is a GGUF file of architecture {said['general.architecture']}, not {ARCHITECTURE}")
    found = {}
    for tensor in reader.tensors:
        named = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if named is None or tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            raise FormatError(f"{path}: a control vector holds F32 direction.N, got {tensor.name}")
        found[int(named[1])] = torch.from_numpy(np.array(tensor.data, dtype=np.float32).reshape(-1))
    if not found or not all(vector.isfinite().all() for vector in found.values()):
        raise FormatError(f"{path} has {len(found)} directions, not all of them finite")
    return dict(sorted(found.items()))


def made_for(path: Path, d_model: int) -> MadeFor | None:
    """The model that it was made for; None where another tool wrote it, which does not tell."""
    _, said = _open(path)
    config_hash = said["sae_persona.config_hash"]
    return (
        MadeFor(name=str(said["sae_persona.model"]), d_model=d_model, config_hash=config_hash) if config_hash else None
    )


def _open(path: Path) -> tuple[Any, dict[str, str | None]]:
    """The file, and the texts under the keys that are read; None for those it lacks."""
    try:
        reader = _package().GGUFReader(path)
        fields = {key: reader.get_field(key) for key in READ}
        return reader, {key: None if field is None else str(field.contents()) for key, field in fields.items()}
    except CORRUPT as error:
        raise FormatError(f"{path} is not a GGUF file: {error}") from error


def _write(path: Path, layers: dict[int, Tensor], model_type: str, intervention: Intervention) -> None:
    writer = _package().GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
    writer.add_string("sae_persona.model", intervention.model.name)
    writer.add_string("sae_persona.config_hash", intervention.model.config_hash or "")
    if intervention.approximation is not None:
        writer.add_string("sae_persona.approximation", json.dumps(intervention.approximation))
    for layer, vector in layers.items():
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _type_of(lm: LM) -> str:
    return str(lm.model.config.get_text_config().model_type)  # pyright: ignore


def _package():
    try:
        import gguf  # optional
    except ImportError as error:
        raise ConfigError("control vectors need the gguf package: pip install 'sae-persona[export]'") from error
    return gguf
