"""Reading and editing the residual stream. The only module that hooks a model.

Hooks run in the order in which they were placed, so a ``read`` inside ``editing`` sees the edited stream.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError
from sae_persona.types import HookPoint


class _Stop(Exception):
    """Everything wanted has been read."""


def model_inputs(lm: LM, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """Keyword arguments for one forward pass of ``lm.model`` over whole sequences, without a cache.

    Positions are counted from the mask, so that padding on either side gives the same activations. Models whose
    forward takes no ``position_ids`` count for themselves.

    input_ids, attention_mask   [b, t] int64, the mask 1 on real tokens
    """
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions, "use_cache": False}
    taken = inspect.signature(lm.model.forward).parameters
    return {key: value for key, value in inputs.items() if key in taken}


@torch.no_grad()
def read(lm: LM, hooks: Iterable[HookPoint], input_ids: Tensor, attention_mask: Tensor) -> dict[HookPoint, Tensor]:
    """Activations at each hook point: [b, t, d_model] in the model's dtype; positions of padding hold anything.

    The forward pass stops at the last of them: later blocks and the logits are never computed.
    ModelError if a hook point does not exist.
    """
    # post comes after pre, whatever the alphabet says
    wanted = sorted(set(hooks), key=lambda hook: (hook.layer, hook.site == "resid_post"))
    found: dict[HookPoint, Tensor] = {}

    def keep(hook: HookPoint, x: Tensor) -> Tensor:
        found[hook] = x
        if hook == wanted[-1]:
            raise _Stop
        return x

    with ExitStack() as stack:
        for hook in wanted:
            handle = _attach(lm, hook, lambda x, hook=hook: keep(hook, x))
            stack.callback(handle.remove)
        if wanted:
            try:
                lm.model(**model_inputs(lm, input_ids, attention_mask))
            except _Stop:
                pass
    return found


@contextmanager
def editing(lm: LM, hook: HookPoint, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, every forward pass of ``lm.model`` goes on with ``edit(x)`` in place of x at the hook point.

    edit   [b, t, d_model] -> [b, t, d_model]; while generating with a cache, t is 1 after the first step

    Nests: edits of one hook point apply outermost first. Gradients flow. The hook is gone on any exit.
    ModelError if the hook point does not exist.
    """
    handle = _attach(lm, hook, edit)
    try:
        yield
    finally:
        handle.remove()


def _attach(lm: LM, hook: HookPoint, visit: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Pass the residual stream at ``hook`` through ``visit`` until the handle is removed."""
    lm.check(hook)
    block = lm.blocks[hook.layer]

    def before(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (visit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": visit(kwargs["hidden_states"])}

    def after(_: Any, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return visit(output) if isinstance(output, Tensor) else (visit(output[0]), *output[1:])

    if hook.site == "resid_pre":
        return block.register_forward_pre_hook(before, with_kwargs=True)
    return block.register_forward_hook(after)


@dataclass(frozen=True)
class Call:
    """One forward pass as the model receives it, before it runs.

    input_ids   [b, t] int64, or None where the caller passed embeddings
    real        [b, t] bool, false on padding
    index       [b, t] int64, how many real tokens stand before this one in its row, those in the cache included
    past        tokens in the cache, padding included
    """

    input_ids: Tensor | None
    real: Tensor
    index: Tensor
    past: int


@contextmanager
def watching(lm: LM, see: Callable[[Call], None]) -> Iterator[None]:
    """Within the block, ``see`` is told of every forward pass of ``lm.model`` before it runs.

    ConfigError for an attention mask that is not [b, past + t]: from such a mask no position can be told.
    """
    names = list(inspect.signature(lm.model.forward).parameters)

    def before(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        see(_call(lm, {**dict(zip(names, args, strict=False)), **kwargs}))

    handle = lm.model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _call(lm: LM, given: dict[str, Any]) -> Call:
    input_ids, cache, mask = (given.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
    b, t = (given["inputs_embeds"] if input_ids is None else input_ids).shape[:2]
    past = 0 if cache is None else int(cache.get_seq_length())
    if mask is None:
        mask = torch.ones(b, past + t, dtype=torch.long, device=lm.device)
    if mask.shape != (b, past + t):
        raise ConfigError(
            f"interventions need an attention mask of shape {[b, past + t]}, got {list(mask.shape)}: pass that one"
        )
    index = mask.long().cumsum(dim=-1) - 1
    return Call(input_ids, mask[:, past:].bool(), index[:, past:], past)
