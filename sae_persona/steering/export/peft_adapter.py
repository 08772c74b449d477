"""PEFT adapters that add a constant: a bias behind the MLP of a block, which is added to the stream as it is.

    adapter_config.json          BEFT: a bias alone. Or LoRA of rank 1 with zero A and B and a bias, for older readers
    adapter_model.safetensors    base_model.model.MODULE.beft_bias [1, d], or MODULE.lora_B.bias [d]
    sae_persona.json             what it was made for, and what is lost where edits stand in for others

Written by hand, so that peft is needed only to read it. The adapter cannot be merged where the base has no bias.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError
from sae_persona.runs import write_whole
from sae_persona.steering.export.additive import additive, by_layer
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.export.weights import check_same, mlp_output

CONFIG, WEIGHTS, FACTS = "adapter_config.json", "adapter_model.safetensors", "sae_persona.json"
TOOL = "a PEFT adapter"
Kind = Literal["beft", "lora"]


def write(intervention: Intervention, lm: LM, path: Path, *, kind: Kind = "beft") -> Path:
    """Write what the edits add as an adapter folder.

    ConfigError for edits that are no sum or act at some tokens only, and for models whose blocks do not add their MLP's
    output to the stream as it is: it is tried on a few tokens before anything is written.
    """
    layers = by_layer(additive(intervention, TOOL))
    if min(layers) < 0:
        raise ConfigError(f"{TOOL} adds behind a block, not to what enters the first: choose a later layer")
    modules: dict[str, tuple[nn.Linear, Tensor]] = {}
    for layer, vector in layers.items():
        name, module = mlp_output(lm, layer, TOOL)
        if not isinstance(module, nn.Linear):
            raise ConfigError(f"{TOOL} wraps Linear modules, {name} is a {type(module).__name__}: use --format baked")
        modules[name] = module, vector
    check_same(lm, intervention, lambda inputs: biased(lm, modules, inputs), TOOL)
    config = {"peft_type": kind.upper(), "target_modules": list(modules), "base_model_name_or_path": lm.name}
    config |= {"inference_mode": True, "task_type": "CAUSAL_LM"}
    if kind == "lora":
        config |= {"r": 1, "lora_alpha": 1, "lora_bias": True, "bias": "none"}

    def fill(temporary: Path) -> None:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (temporary / FACTS).write_text(json.dumps(facts(intervention), indent=1) + "\n", encoding="utf-8")
        save_file(_tensors(modules, kind), temporary / WEIGHTS)

    write_whole(path, fill, mark=CONFIG)
    return path


def facts(intervention: Intervention) -> dict[str, Any]:
    """What a folder of another format tells of where it comes from."""
    return {"model": asdict(intervention.model), "approximation": intervention.approximation}


def _tensors(modules: dict[str, tuple[nn.Linear, Tensor]], kind: Kind) -> dict[str, Tensor]:
    tensors = {}
    for name, (module, vector) in modules.items():
        key = f"base_model.model.{name}"
        if kind == "beft":
            tensors[f"{key}.beft_bias"] = vector[None].contiguous()
            continue
        tensors[f"{key}.lora_A.weight"] = torch.zeros(1, module.in_features)
        tensors[f"{key}.lora_B.weight"] = torch.zeros(module.out_features, 1)
        tensors[f"{key}.lora_B.bias"] = vector
    return tensors


def biased(lm: LM, modules: Mapping[str, tuple[nn.Module, Tensor]], inputs: dict[str, Any]) -> Tensor:
    """Logits with a vector [d] added to the output of each module, which is what the adapter does."""
    with ExitStack() as stack:
        for module, vector in modules.values():
            bias = vector.to(lm.device, lm.dtype)
            handle = module.register_forward_hook(lambda _, args, output, bias=bias: output + bias)
            stack.callback(handle.remove)
        return lm.model(**inputs).logits
