"""Edits in vLLM: a plugin that installs our hooks in every worker.

    pip install sae-persona            beside vLLM: the entry point vllm.general_plugins names `register`
    sae-persona export RUN --edit ... --positions every --format vllm --out x.json
    SAE_PERSONA_INTERVENTION=x.json vllm serve MODEL --enforce-eager

vLLM calls `register` in each process before it loads a model. With the variable set, what its loaders load gets a hook
on each edited block. Two surfaces of vLLM are used, and nothing else:

    BaseModelLoader.load_model(self, vllm_config, model_config, ...) -> the model
    block(positions, hidden, residual) -> (hidden, residual)         the stream is their sum, residual None at first

The hook writes what the edits change into ``hidden``. Tokens of all requests are in one row there and nothing tells
where a prompt ends, so edits act at every token, for every request. Without --enforce-eager the blocks run compiled,
past any hook, so that is refused; so are blocks that are spread over pipeline stages.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, ModelError
from sae_persona.steering.export import native
from sae_persona.steering.export.additive import check_everywhere, check_local
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.rows import Rows, wins

VARIABLE = "SAE_PERSONA_INTERVENTION"
TOOL = "the vLLM plugin"


def write(intervention: Intervention, lm: LM, path: Path) -> Path:
    """Write the native file of edits that the plugin can apply. ConfigError for conditions, some tokens only, TopK."""
    check(intervention)
    return native.write(intervention, path)


def check(intervention: Intervention) -> None:
    """ConfigError for what the plugin cannot apply."""
    check_everywhere(intervention, TOOL)
    check_local(intervention, TOOL)


def register() -> None:
    """What vLLM calls. Without the variable nothing is changed; called again, nothing more is."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    from vllm.model_executor.model_loader.base_loader import (  # pyright: ignore[reportMissingImports]
        BaseModelLoader,  # only vLLM's own processes have it
    )

    intervention = native.load_intervention(path)
    check(intervention)
    _patch(BaseModelLoader, intervention)


def _patch(loader: Any, intervention: Intervention) -> None:
    """Have ``load_model`` of a class, and of those that override it, install the hooks in what it returns."""
    own = loader.__dict__.get("load_model")
    if own is not None and not hasattr(own, "sae_persona"):
        loader.load_model = _installing(own, intervention)
    for kind in loader.__subclasses__():
        _patch(kind, intervention)


def _installing(load: Callable[..., nn.Module], intervention: Intervention) -> Callable[..., nn.Module]:
    @functools.wraps(load)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        if not model_config.enforce_eager:
            raise ConfigError(f"{TOOL} needs hooks, which compiled blocks pass by: start vLLM with --enforce-eager")
        return install(load(self, vllm_config, model_config, *args, **kwargs), intervention)

    load_model.sae_persona = True  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]
    return load_model


def install(model: nn.Module, intervention: Intervention) -> nn.Module:
    """Hook the blocks of a vLLM model; returns it. ModelError for one of other sizes, or in parts.

    Idempotent: a loader that calls another's gives the model twice.
    """
    if getattr(model, "sae_persona_edits", None) is not None:
        return model
    blocks = _blocks(model, intervention)
    device = next(model.parameters()).device
    for hook in intervention.hooks:
        rows = intervention.rows(hook, device)
        block = blocks[hook.layer]
        if hook.site == "resid_post":
            block.register_forward_hook(lambda _, args, out, rows=rows: _after(rows, out))
        else:
            block.register_forward_pre_hook(
                lambda _, args, kwargs, rows=rows: _before(rows, args, kwargs), with_kwargs=True
            )
    model.sae_persona_edits = True  # pyright: ignore[reportArgumentType]
    return model


def _blocks(model: nn.Module, intervention: Intervention) -> nn.ModuleList:
    made_for = intervention.model
    try:
        blocks = model.get_submodule(made_for.blocks or "")
    except AttributeError as error:
        raise ModelError(f"vLLM's model has no {made_for.blocks}, where {made_for.name} has its blocks") from error
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != made_for.n_layers:
        raise ModelError(f"{made_for.blocks} of vLLM's model is not the {made_for.n_layers} blocks of {made_for.name}")
    if missing := [i for i, block in enumerate(blocks) if type(block).__name__ == "PPMissingLayer"]:
        raise ModelError(f"block {missing[0]} is in another pipeline stage: {TOOL} needs --pipeline-parallel-size 1")
    return blocks


def _after(rows: Rows, out: Any) -> Any:
    if not isinstance(out, tuple):
        return out + _change(rows, out, None)
    hidden, residual = out[0], out[1] if len(out) > 1 else None
    return (hidden + _change(rows, hidden, residual), *out[1:])


def _before(rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Blocks take (positions, hidden, residual), by place or by name."""
    given = dict(zip(("positions", "hidden_states", "residual"), args, strict=False)) | kwargs
    given["hidden_states"] = given["hidden_states"] + _change(rows, given["hidden_states"], given.get("residual"))
    return (), given


def _change(rows: Rows, hidden: Tensor, residual: Tensor | None) -> Tensor:
    """What the edits add to the stream: [n, d] in the dtype of ``hidden``."""
    x = hidden.float() if residual is None else hidden.float() + residual.float()
    if x.shape[-1] != rows.enc.shape[1]:
        raise ModelError(f"the edits are for width {rows.enc.shape[1]}, vLLM's model has {x.shape[-1]}")
    flat = x.flatten(0, -2)
    on = wins(rows.edits, torch.ones(len(flat), len(rows.edits), dtype=torch.bool, device=x.device))[:, rows.owner]
    return (rows.deltas(flat, on) @ rows.dec).view_as(x).to(hidden.dtype)
