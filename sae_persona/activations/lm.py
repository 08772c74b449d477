"""A language model, its tokenizer, and where its blocks are. Any Hugging Face causal LM.

transformers is imported inside the functions that load, so that importing this module is light.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sae_persona.errors import ModelError, RunError
from sae_persona.types import HookPoint, Site

# what a config says about where it came from and how it is run, not about what it computes
VOLATILE = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"})


@dataclass(frozen=True, eq=False)
class LM:
    """A causal LM ready to be read: made by ``load_lm`` or ``wrap_lm``."""

    model: nn.Module
    tokenizer: Any
    blocks: nn.ModuleList
    """The blocks in the order in which they run; ``layers.12`` is ``blocks[12]``."""
    blocks_path: str
    """Where they are in ``model``: ``model.layers``, ``transformer.h`` ..."""
    name: str

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return _text_config(self.model).hidden_size

    @property
    def n_positions(self) -> int | None:
        """The longest sequence that the config promises to take, in tokens; None where it does not say."""
        return getattr(_text_config(self.model), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def bos_id(self) -> int | None:
        """The tokenizer's BOS; configs name one even where the tokenizer has none."""
        return self.tokenizer.bos_token_id

    @property
    def pad_id(self) -> int:
        """What fills padding: the pad token, else EOS, else 0. It is always masked."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer puts before a plain text: ``[bos_id]`` or nothing."""
        first = self.tokenizer("a").input_ids[:1]
        return first if first == [self.bos_id] else []

    @cached_property
    def config_hash(self) -> str:
        """SHA-256 of the config in hex. The same from memory, a folder or the hub, in any dtype."""
        config = json.loads(self.model.config.to_json_string(use_diff=False))  # pyright: ignore
        return sha256(json.dumps(_lasting(config), sort_keys=True).encode()).hexdigest()

    def compile(self) -> None:
        """Compile each block; hooks stay outside, where they see what they saw."""
        for block in self.blocks:
            block.forward = torch.compile(block.forward)

    def hook_points(self) -> list[HookPoint]:
        """Every place that can be read or edited, in the order in which a forward pass meets them."""
        return [HookPoint(layer, site) for layer in range(self.n_layers) for site in get_args(Site)]

    def check(self, hook: HookPoint) -> None:
        """ModelError if the model has no such hook point."""
        if hook.layer >= self.n_layers:
            raise ModelError(
                f"{hook} does not exist: {self.name} has layers 0 to {self.n_layers - 1}. "
                f"`sae-persona show {self.name}` lists hook points."
            )


def checked_device(name: str) -> torch.device:
    """The device of that name. RunError if there is none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"a device reads cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise RunError(f"there are {torch.cuda.device_count()} CUDA devices here, no {name}: choose another, or cpu")
    return device


def load_lm(
    name: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, blocks: str | None = None
) -> LM:
    """Load a model and its tokenizer, frozen and in eval mode.

    name     folder in Hugging Face layout, hub id, or "lab" for the model that comes with this package
    blocks   dotted path of the list of blocks, where it is not found by itself

    ModelError if it is not there, not a causal LM or incomplete; RunError if the device is not there.
    """
    import transformers
    from safetensors import SafetensorError

    checked_device(device)
    source, on_disk = _source(str(name))
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(  # pyright: ignore
            source, dtype=dtype, local_files_only=on_disk, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot load {name} as a causal LM: {reason}") from error
    tokenizer = load_tokenizer(name)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"the weights of {name} lack {len(missing)} tensors, the first {missing[0]}: fetch it again")
    return wrap_lm(model.to(device).requires_grad_(False), tokenizer, name=str(name), blocks=blocks)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of what ``load_lm`` takes, without its weights. ModelError if it is not there."""
    import transformers

    source, on_disk = _source(str(name))
    try:
        return transformers.AutoTokenizer.from_pretrained(source, local_files_only=on_disk, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot load the tokenizer of {name}: {reason}") from error


def wrap_lm(model: nn.Module, tokenizer: Any, *, name: str, blocks: str | None = None) -> LM:
    """An ``LM`` around a model that is in memory already, which goes into eval mode.

    ModelError if the list of blocks is not found: give its dotted path as ``blocks``.
    """
    path = _find_blocks(model, name) if blocks is None else blocks
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f"{name} has no module {path}: {_choices(model)}") from error
    if not isinstance(found, nn.ModuleList) or not len(found):
        raise ModelError(f"{path} of {name} is a {type(found).__name__}, not a list of blocks: {_choices(model)}")
    return LM(model.eval(), tokenizer, found, path, name)


def padded(
    lm: LM, sequences: Sequence[Sequence[int]], *, side: Literal["left", "right"] = "left"
) -> tuple[Tensor, Tensor]:
    """Token lists of any lengths as ``input_ids [b, t]`` and ``attention_mask [b, t]``, int64, on the LM's device."""
    width = max([1, *map(len, sequences)])  # models cannot run on no positions at all
    input_ids = torch.full((len(sequences), width), lm.pad_id)
    mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        at = slice(width - len(sequence), width) if side == "left" else slice(len(sequence))
        input_ids[row, at] = torch.tensor(sequence, dtype=torch.long)
        mask[row, at] = 1
    return input_ids.to(lm.device), mask.to(lm.device)


def _source(name: str) -> tuple[str, bool]:
    """Where to load from, and whether that is a folder on this disk."""
    if name == "lab":
        from sae_persona.lab.card import FOLDER  # here, so that other models need no lab

        return str(FOLDER), True
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), True
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"no model folder at {name}: give a folder in Hugging Face layout, a hub id, or lab")
    return name, False


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()  # pyright: ignore


def _find_blocks(model: nn.Module, name: str) -> str:
    """The one outermost ModuleList that is as long as the config has layers; experts and the like lie inside it."""
    n_layers = getattr(_text_config(model), "num_hidden_layers", None)
    lists = [path for path, module in _lists(model) if len(module) == n_layers]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        found = "no list" if not outermost else f"{len(outermost)} lists"
        raise ModelError(f"{name} has {found} of {n_layers} blocks: {_choices(model)}")
    return outermost[0]


def _lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]


def _choices(model: nn.Module) -> str:
    paths = ", ".join([f"{path} ({len(module)})" for path, module in _lists(model)][:4])
    return f"pass --blocks PATH of its list of blocks. Lists here: {paths or 'none'}"


def _lasting(value: Any) -> Any:
    """A config without volatile and private keys, at every depth."""
    if isinstance(value, dict):
        return {key: _lasting(v) for key, v in value.items() if key not in VOLATILE and not key.startswith("_")}
    return value
