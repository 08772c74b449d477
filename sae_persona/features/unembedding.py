"""What a direction of the residual stream does to the logits: the final norm and the unembedding, as one linear map.

Behind the last block stand a norm, in some models a projection, and the unembedding W_U. At a stream x the norm divides
by a number s(x), the root mean square or the standard deviation, so that adding t d to x changes the logits by

    W_U P (gain * centred(d)) t / s        gain: the norm's weight as it is applied (Gemma's 1 + w), P: the projection

to first order, apart from the change of s itself, which scales all logits alike. `logits` gives this with t / s = 1.
Centring takes the mean of d away, as LayerNorm does and RMSNorm does not. The norm's bias (beta) and a bias of the
unembedding do not depend on d, so they are left out; a soft cap of the logits (Gemma 2) is left out, too.

Nothing is told from names: a forward pass shows which modules run after the last block, and the norm's gain and
centring are measured on it, then checked on random vectors, as is the whole map on the model's own logits.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import LM
from sae_persona.errors import ModelError

_LARGE = 1e3  # a probe so large that the norm's epsilon vanishes beside it
_TOLERANCE = 0.02  # of bf16 weights; a wrong form is off by far more


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The map from the last block's output to the logits, without its biases.

    gain      [d_model] fp32          1 where there is no norm
    centred   whether the norm takes the mean away
    project   [d_out, d_model] or None
    weight    [n_tokens, d_out]       the unembedding, in the model's dtype; rows beyond the tokenizer's are cut
    scale     what the model multiplies its logits by
    """

    gain: Tensor
    centred: bool
    project: Tensor | None
    weight: Tensor
    scale: float

    @property
    def n_tokens(self) -> int:
        return len(self.weight)

    def fold(self, directions: Tensor) -> Tensor:
        """Directions as the unembedding sees them: [n, d_model] -> [n, d_out] fp32."""
        d = directions.to(self.gain)
        d = (d - d.mean(-1, keepdim=True) if self.centred else d) * self.gain
        return (d if self.project is None else d @ self.project.float().T) * self.scale

    def logits(self, directions: Tensor) -> Tensor:
        """What adding each direction does to the logits where the norm divides by 1: [n, d_model] -> [n, n_tokens]."""
        return self.fold(directions) @ self.weight.float().T


@torch.no_grad()
def find_unembedding(lm: LM) -> Unembedding:
    """Find and measure it. ModelError if the model's logits are no such function of its last block's output."""
    head = lm.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{lm.name} has no linear unembedding (get_output_embeddings): it has no logit lens")
    seen = _behind_the_blocks(lm, head)
    ran = [module for module in seen.modules if not isinstance(module, nn.Dropout | nn.Identity)]
    norm = ran.pop(0) if ran and not isinstance(ran[0], nn.Linear) else None
    if len(ran) > 1 or not all(isinstance(module, nn.Linear) for module in ran):
        names = ", ".join(type(module).__name__ for module in seen.modules)
        raise ModelError(f"{lm.name} runs {names} after its last block, wanted a norm and at most one projection")
    gain, centred = torch.ones_like(seen.stream), False
    if norm is not None:
        gain, centred = _measure_norm(lm, norm)
    project = ran[0].weight if ran else None
    found = Unembedding(gain, centred, project, head.weight[: len(lm.tokenizer)], 1.0)
    return replace(found, scale=_scale(lm, found, seen, head, normed=norm is not None))


@dataclass
class _Seen:
    """A short forward pass: what ran after the last block, and what passed there at the last token (fp32)."""

    modules: list[Any]
    stream: Tensor
    head_input: Tensor
    product: Tensor
    logits: Tensor


def _behind_the_blocks(lm: LM, head: nn.Linear) -> _Seen:
    """Run the model on a few tokens and note the outermost modules that run between the last block and the head."""
    modules: list[Any] = []
    kept: dict[str, Tensor] = {}
    inside: list[nn.Module] = []

    def enter(module: nn.Module, _: Any) -> None:
        if "stream" in kept and "input" not in kept:
            if not inside and module is not head:
                modules.append(module)
            inside.append(module)

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        if module is lm.blocks[-1]:
            kept["stream"] = (output if isinstance(output, Tensor) else output[0])[0, -1].float()
        elif module is head:
            kept["input"] = args[0][0, -1]
        if inside and inside[-1] is module:
            inside.pop()

    handles = [module.register_forward_pre_hook(enter) for module in lm.model.modules()]
    handles += [module.register_forward_hook(leave) for module in lm.model.modules()]
    try:
        ids = torch.arange(1, 6, device=lm.device)[None]
        out = lm.model(**model_inputs(lm, ids, torch.ones_like(ids))).logits[0, -1].float()
    finally:
        for handle in handles:
            handle.remove()
    if not {"stream", "input"} <= set(kept):
        raise ModelError(f"{lm.name} does not run its unembedding after its last block: it has no logit lens")
    product = nn.functional.linear(kept["input"], head.weight, head.bias)  # of its weights, whatever its forward does
    return _Seen(modules, kept["stream"], kept["input"].float(), product.float(), out)


def _measure_norm(lm: LM, norm: nn.Module) -> tuple[Tensor, bool]:
    """The gain [d_model] and whether the mean is taken away. ModelError if it is neither RMSNorm nor LayerNorm."""
    weight = next(norm.parameters(), next(lm.model.parameters()))

    def run(x: Tensor) -> Tensor:
        return norm((_LARGE * x).to(weight)[None])[0].float()

    def odd(x: Tensor) -> Tensor:  # without the bias
        return (run(x) - run(-x)) / 2

    d = lm.d_model
    signs = torch.ones(d, device=weight.device)
    signs[d // 2 :] = -1  # mean 0 and mean square 1, but for an odd width
    centred = bool(odd(torch.ones_like(signs)).norm() < 0.1 * odd(signs).norm())
    gain = odd(signs) / _normalized(signs, centred)
    probe = torch.randn(d, generator=torch.Generator().manual_seed(0)).to(weight.device) + 0.5
    wanted = gain * _normalized(probe, centred)
    if not (odd(probe) - wanted).norm() <= _TOLERANCE * wanted.norm():
        raise ModelError(f"{type(norm).__name__} of {lm.name} is neither an RMSNorm nor a LayerNorm: no logit lens")
    return gain, centred


def _normalized(x: Tensor, centred: bool) -> Tensor:
    x = x - x.mean() if centred else x
    return x / x.square().mean().sqrt()


def _scale(lm: LM, found: Unembedding, seen: _Seen, head: nn.Linear, *, normed: bool) -> float:
    """What the model multiplies by on the way. ModelError unless the map gives what the model's own modules give."""

    def tail(x: Tensor) -> Tensor:
        x = x.to(head.weight)[None, None]
        for module in seen.modules:
            x = module(x)
        return x[0, 0].float()

    x = seen.stream * (_LARGE / seen.stream.square().mean().sqrt())
    divisor = (x - x.mean() if found.centred else x).square().mean().sqrt() if normed else x.new_ones(())
    wanted = found.fold(x[None])[0] / divisor
    got = tail(x) - tail(torch.zeros_like(x))  # what is left of nothing is the biases
    before, after = _ratio(seen.head_input, tail(seen.stream)), _ratio(seen.logits, seen.product)
    if after is None and getattr(lm.model.config.get_text_config(), "final_logit_softcapping", None):  # pyright: ignore
        after = 1.0
    if before is None or after is None or not (got - wanted).norm() <= 2 * _TOLERANCE * wanted.norm():
        raise ModelError(f"the logits of {lm.name} do not follow from its final norm and unembedding: no logit lens")
    return before * after


def _ratio(a: Tensor, b: Tensor) -> float | None:
    """The number c with a = c b, if there is one."""
    c = float((a @ b) / (b @ b))
    return c if (a - c * b).norm() <= _TOLERANCE * a.norm() else None
