"""Attention in rows that hold several sequences, without a mask of [t, t]: each sequence attends to itself alone.

A mask keeps scaled_dot_product_attention from its fastest kernel and makes it compute what the mask then hides. The
variable-length kernel of torch (Dao 2023, FlashAttention-2) is told where sequences begin and does neither.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.errors import ModelError

_NAME = "sae_persona_packed"
_REFUSED = ("softcap", "position_bias", "s_aux")  # what changes scores, which the kernel knows nothing of
_now: tuple[Tensor, int] | None = None
"""Bounds and width of the rows that the model is reading: models do not all pass keywords on to their attention."""


def needs_no_mask(lm: LM) -> bool:
    """Whether `attending_apart` can run the model: half precision on a GPU, SDPA, plain scores, a torch that has it."""
    config: Any = lm.model.config.get_text_config()  # pyright: ignore
    plain = getattr(config, "attn_logit_softcapping", None) is None
    sdpa = getattr(config, "_attn_implementation", None) == "sdpa" and hasattr(lm.model, "set_attn_implementation")
    half = lm.device.type == "cuda" and lm.dtype in (torch.bfloat16, torch.float16)
    return plain and sdpa and half and _varlen() is not None


@contextmanager
def attending_apart(lm: LM, bounds: Tensor, width: int) -> Iterator[None]:
    """Within the block, attention of ``lm.model`` is causal inside each sequence and sees nothing outside it.

    bounds   [s + 1] int32, the first of the b * width positions of each of s sequences, runs of padding included, and
             b * width at the end

    The model must be called without an attention mask. ModelError where its attention is not plain.
    """
    from transformers import AttentionInterface

    global _now
    model: Any = lm.model
    AttentionInterface.register(_NAME, _attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    _now = (bounds, width)
    try:
        yield
    finally:
        _now = None
        model.set_attn_implementation(before)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float | None = None, **given: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: query, key, value [b, heads, t, d] -> [b, t, heads, d]."""
    if refused := [name for name in _REFUSED if given.get(name) is not None]:
        raise ModelError(f"attention with {refused[0]} cannot run on packed rows: pass --no-pack")
    varlen = _varlen()
    assert _now is not None and varlen is not None
    bounds, width = _now
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = varlen(q, k, v, bounds, width, scaling)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


def _varlen() -> Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None], Tensor] | None:
    """Torch's kernel in the form that this torch has, or None: (q, k, v, bounds, longest, scale)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    taken = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in taken else {"is_causal": True}
    if "scale" not in taken or not set(causal) <= set(taken):
        return None
    grouped = "enable_gqa" in taken

    def call(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
        share = q.shape[1] // k.shape[1]
        if share > 1 and not grouped:
            k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
        options = causal | ({"enable_gqa": share > 1} if grouped else {})
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, **options)  # pyright: ignore

    return call
