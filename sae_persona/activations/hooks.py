"""Reading and editing the residual stream. The only module that hooks a model.

Hooks run in the order in which they were placed, so a ``read`` inside ``editing`` sees the edited stream.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sae_persona.activations.lm import LM
from sae_persona.activations.packed_attention import attending_apart, needs_no_mask
from sae_persona.errors import ConfigError, ModelError
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
    return _read(lm, hooks, model_inputs(lm, input_ids, attention_mask))


@torch.no_grad()
def read_rows(
    lm: LM, hooks: Iterable[HookPoint], input_ids: Tensor, position: Tensor, segment: Tensor, bounds: Tensor | None
) -> dict[HookPoint, Tensor]:
    """As `read`, of rows that may hold several sequences, each of which sees only itself.

    input_ids, position, segment   [b, t] int64: the position in its sequence, the sequence's number in its row; -1 on
                                   padding, which comes last
    bounds                         [s + 1] int32, the first of the b * t positions of each sequence and run of padding,
                                   and b * t; None where no row holds more than one, so that plain causal attention
                                   keeps them apart

    Not for every model: see `check_packing`.
    """
    given = {"input_ids": input_ids, "position_ids": position, "use_cache": False}
    masked = bounds is not None and not needs_no_mask(lm)
    if masked:
        given["attention_mask"] = _mask(segment, lm.dtype)
    taken = inspect.signature(lm.model.forward).parameters
    with nullcontext() if bounds is None or masked else attending_apart(lm, bounds, input_ids.shape[1]):
        return _read(lm, hooks, {key: value for key, value in given.items() if key in taken})


def _mask(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores so that each position sees its own sequence up to itself: [b, t] -> [b, 1, t, t]."""
    b, t = segment.shape
    sees = (segment[:, :, None] == segment[:, None, :]).tril_()
    mask = torch.zeros(b, 1, t, t, dtype=dtype, device=sees.device)
    return mask.masked_fill_(~sees[:, None], torch.finfo(dtype).min)


def check_packing(lm: LM, hook: HookPoint, width: int) -> None:
    """ModelError unless sequences that share a row of ``width`` tokens give the activations that each gives alone.

    Models that count positions from the mask do not, nor do those that look back over a shorter window of their own.
    """
    window = getattr(lm.model.config.get_text_config(), "sliding_window", None)  # pyright: ignore
    if window is not None and window < width:
        raise ModelError(f"{lm.name} looks back {window} tokens, which rows of {width} would undo: pass --no-pack")
    n_tokens = int(lm.model.get_input_embeddings().num_embeddings)  # pyright: ignore
    first, second = (torch.arange(1, 1 + n, device=lm.device) * 7 % n_tokens for n in (5, 9))
    ids = torch.cat([first, second])[None]
    position = torch.cat([torch.arange(5), torch.arange(9)])[None].to(lm.device)
    segment = (torch.arange(14, device=lm.device) >= 5).long()[None]
    bounds = torch.tensor([0, 5, 14], dtype=torch.int32, device=lm.device)
    together = read_rows(lm, [hook], ids, position, segment, bounds)[hook][0].float()
    alone = [read(lm, [hook], x[None], torch.ones_like(x)[None])[hook][0].float() for x in (first, second)]
    off = (together - torch.cat(alone)).norm() / torch.cat(alone).norm()
    if not off < 0.03:  # bf16 is within 0.01
        raise ModelError(
            f"{lm.name} does not keep the sequences of a row apart (activations are {off:.0%} off): pass --no-pack"
        )


def _read(lm: LM, hooks: Iterable[HookPoint], inputs: dict[str, Any]) -> dict[HookPoint, Tensor]:
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
                lm.model(**inputs)
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
    past        tokens in the cache, padding included; None where only a GPU knows: a static cache
    """

    input_ids: Tensor | None
    real: Tensor
    index: Tensor
    past: int | None


@contextmanager
def watching(lm: LM, see: Callable[[Call], None]) -> Iterator[None]:
    """Within the block, ``see`` is told of every forward pass of ``lm.model`` before it runs.

    ConfigError for a mask from which no position can be told: [b, past + t] for a cache that grows,
    [b, 1, t, any] or position ids for a static one.
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
    past = 0 if cache is None else cache.get_seq_length()
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = mask.get("full_attention", next(iter(mask.values())))
    if getattr(cache, "is_compileable", False) or isinstance(past, Tensor):
        return _static_call(input_ids, given.get("position_ids"), mask, (b, t), lm.device)
    if mask is None:
        mask = torch.ones(b, past + t, dtype=torch.long, device=lm.device)
    if mask.shape != (b, past + t):
        raise ConfigError(
            f"interventions need an attention mask of shape {[b, past + t]}, got {list(mask.shape)}: pass that one"
        )
    index = mask.long().cumsum(dim=-1) - 1
    return Call(input_ids, mask[:, past:].bool(), index[:, past:], past)


def _static_call(
    input_ids: Tensor | None, position: Tensor | None, mask: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Call:
    """A pass with a cache whose length the host does not ask for: positions are told by their ids, or by the mask."""
    if mask is not None and mask.ndim == 4:
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].sum(dim=-1)  # others are added to scores
        real, index = (seen > 0).expand(shape), seen.expand(shape) - 1
        return Call(input_ids, real, index if position is None else position.expand(shape), None)
    if position is None or mask is not None:
        got = "none" if mask is None else f"{mask.dtype} {list(mask.shape)}"
        raise ConfigError(
            f"interventions with a static cache need position ids and no mask, or a mask [b, 1, t, any]: got {got}"
        )
    return Call(input_ids, torch.ones(shape, dtype=torch.bool, device=device), position.expand(shape), None)
