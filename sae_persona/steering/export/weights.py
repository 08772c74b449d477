"""Where a model's blocks write into the residual stream, and whether a change of the model does what edits do."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError
from sae_persona.steering.export.intervention import Intervention

MLP = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.fc2", "fc2")
ATTENTION = (
    *("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.c_proj", "attn.out_proj"),
    *("attention.dense", "attention.o_proj"),
)
EXACT = 1e-3
"""Of the edits' effect on the logits, in fp32; other dtypes round more."""
ROUNDED = 0.05


def mlp_output(lm: LM, layer: int, tool: str) -> tuple[str, nn.Module]:
    """The module whose output is the block's MLP's, and its name. ConfigError where there is none, or experts."""
    return _writer(lm, layer, MLP, tool)


def attention_output(lm: LM, layer: int, tool: str) -> tuple[str, nn.Module]:
    """Likewise of the attention."""
    return _writer(lm, layer, ATTENTION, tool)


def _writer(lm: LM, layer: int, names: tuple[str, ...], tool: str) -> tuple[str, nn.Module]:
    found = dict(lm.blocks[layer].named_modules())
    for name in names:
        if name in found and hasattr(found[name], "weight"):
            return f"{lm.blocks_path}.{layer}.{name}", found[name]
    raise ConfigError(
        f"{tool} changes one of {', '.join(names)}, and the blocks of {lm.name} have none: choose --format steer-py"
    )


def rows_first(module: nn.Module, weight: Tensor) -> Tensor:
    """A view of its weight [d_out, d_in]; GPT-2's Conv1D holds it the other way round."""
    return weight if isinstance(module, nn.Linear) else weight.T


@torch.no_grad()
def check_same(lm: LM, intervention: Intervention, changed: Callable[[dict[str, Any]], Tensor], tool: str) -> None:
    """ConfigError unless a changed model does to the logits what the edits do, as far as the dtype shows it.

    changed   a forward pass of it: keyword arguments -> logits

    Where a model normalises what a block adds, as Gemma 2 and 3 do, or adds to it elsewhere, this tells.
    """
    n_tokens = int(lm.model.get_input_embeddings().num_embeddings)  # pyright: ignore
    ids = (torch.arange(1, 13, device=lm.device) * 7 % n_tokens)[None]
    inputs = model_inputs(lm, ids, torch.ones_like(ids))
    plain = lm.model(**inputs).logits.float()
    with intervention.applied(lm):
        wanted = lm.model(**inputs).logits.float()
    got = changed(inputs).float()
    is_exact = lm.dtype == torch.float32
    effect, off = (wanted - plain).abs().max(), (got - wanted).abs().max()
    if not off <= (EXACT if is_exact else ROUNDED) * effect + (1e-5 if is_exact else 0.02) * plain.abs().max():
        raise ConfigError(
            f"{tool} of {lm.name} would not do what the edits do (logits are {off / effect:.0%} of their effect off): "
            "the model changes what its blocks write before it adds it, or reads it in between: choose --format native"
        )
