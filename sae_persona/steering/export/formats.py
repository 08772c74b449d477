"""Every format that an intervention is written in, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError
from sae_persona.steering.export import (
    baked,
    control_vector,
    lm_eval_file,
    native,
    neuronpedia,
    nnsight_snippet,
    peft_adapter,
    saelens_features,
    steer_script,
    vllm_plugin,
)
from sae_persona.steering.export.intervention import Intervention

Writer = Callable[[Intervention, LM, Path], Path]


@dataclass(frozen=True)
class Format:
    """How it is written, and how its name ends; "" is a folder."""

    write: Writer
    suffix: str
    data_beside: bool = False
    """Whether a .safetensors file of the same name goes beside it."""

    def files(self, path: Path) -> list[Path]:
        """What is written."""
        return [path, path.with_suffix(".safetensors")] if self.data_beside else [path]


FORMATS: dict[str, Format] = {
    "native": Format(lambda intervention, lm, path: native.write(intervention, path), ".json", True),
    "steer-py": Format(steer_script.write, ".py", True),
    "gguf": Format(control_vector.write, ".gguf"),
    "lm-eval": Format(lm_eval_file.write, ".pt"),
    "peft": Format(peft_adapter.write, ""),
    "peft-lora": Format(partial(peft_adapter.write, kind="lora"), ""),
    "baked": Format(baked.write, ""),
    "vllm": Format(vllm_plugin.write, ".json", True),
    "neuronpedia": Format(neuronpedia.write, ".json"),
    "saelens": Format(saelens_features.write, ""),
    "nnsight": Format(nnsight_snippet.write, ".py", True),
}


def format_of(name: str) -> Format:
    """ConfigError for a name that is none."""
    if name not in FORMATS:
        raise ConfigError(f"a format is one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def write_as(name: str, intervention: Intervention, lm: LM, path: str | Path) -> Path:
    """Write an intervention in a format of `FORMATS`; returns the path.

    ModelError unless ``lm`` is the model of the intervention; ConfigError for another suffix and for what the format
    cannot say, before anything is written.
    """
    form, path = format_of(name), Path(path)
    if form.suffix and path.suffix != form.suffix:
        raise ConfigError(f"a {name} file ends in {form.suffix}, got {path.name}")
    intervention.model.check(lm)
    return form.write(intervention, lm, path)
