"""What a step keeps, in the order of the whole dictionary: for checkpoints, other numbers of ranks, and export.

`kept` hands out the step's own tensors, not copies: a checkpoint writes them. `put` fills them from whichever parts
overlap the block, so a run goes on with any number of ranks, one included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from sae_persona.errors import FormatError
from sae_persona.sae.plain_step import PlainStep
from sae_persona.sae.step import Weights
from sae_persona.types import State

if TYPE_CHECKING:  # CPU users need no Triton
    from sae_persona.sae.kernel_step import KernelStep


@dataclass(frozen=True)
class Kept:
    """What lasts from one step to the next.

    first      latent of the first row
    n_latents  of all ranks
    rows       [n_rows, ...] each, of the rank's latents: weights, moments, thresholds, tokens since they fired
    whole      the same on every rank: b_dec, its moments, and what counts steps on the device
    numbers    likewise, on the host
    """

    first: int
    n_latents: int
    rows: dict[str, Tensor]
    whole: dict[str, Tensor]
    numbers: dict[str, Any]

    @property
    def stop(self) -> int:
        """The latent behind the last row."""
        return self.first + len(self.rows["silent"])

    def state(self) -> State:
        """As a checkpoint writes it."""
        named = State(self.rows).under("rows.").joined(State(self.whole).under("whole."))
        return named.joined(State({}, {"first": self.first, "n_latents": self.n_latents, "step": self.numbers}))

    @classmethod
    def of(cls, state: State) -> Self:
        """As a checkpoint gives it back."""
        n = state.numbers
        return cls(
            n["first"], n["n_latents"], dict(state.of("rows.").tensors), dict(state.of("whole.").tensors), n["step"]
        )


def kept(step: PlainStep | KernelStep) -> Kept:
    """Its own tensors, on its device; the current stream has then waited for the decoder's update."""
    if isinstance(step, PlainStep):
        rows, whole = _plain(step)
    else:
        step.wait()
        rows, whole = _kernels(step)
    return Kept(step.shard.bounds(step.n_all)[0], step.n_all, rows, whole, step.numbers)


@torch.no_grad()
def put(step: PlainStep | KernelStep, parts: Iterable[Kept]) -> None:
    """Go on where other steps left off: ``parts`` hold all latents together, in blocks of any size, on any device.

    The step must have been made with the same settings. FormatError if something is missing or of another shape.
    """
    own, filled = kept(step), 0
    for part in parts:
        if part.rows.keys() != own.rows.keys() or part.n_latents != own.n_latents:
            wanted = f"{own.n_latents} latents with {', '.join(own.rows)}"
            raise FormatError(f"a part must be of {wanted}, got {part.n_latents} with {', '.join(part.rows)}")
        first, stop = max(own.first, part.first), min(own.stop, part.stop)
        if first >= stop:
            continue
        for name, rows in own.rows.items():
            _fill(
                name, rows[first - own.first : stop - own.first], part.rows[name][first - part.first :][: stop - first]
            )
        for name, whole in own.whole.items():
            _fill(name, whole, part.whole[name])
        step.go_on(part.numbers, same_block=(part.first, part.stop) == (own.first, own.stop))
        filled += stop - first
    if filled != own.stop - own.first:
        raise FormatError(f"the parts must hold latents {own.first} to {own.stop - 1} once, got {filled} of them")


def gathered(step: PlainStep | KernelStep) -> tuple[Weights, Tensor | None] | None:
    """The weights of all ranks and JumpReLU's thresholds, on rank 0 and in the memory of the CPU; None on the others.

    Every rank has to call it.
    """
    weights, threshold = step.weights, step.threshold
    w_enc, b_enc, w_dec = (step.shard.to_first(w, step.n_all) for w in weights[:3])
    threshold = None if threshold is None else step.shard.to_first(threshold, step.n_all)
    if w_enc is None or b_enc is None or w_dec is None:
        return None
    return Weights(w_enc, b_enc, w_dec, weights.b_dec.detach().cpu()), threshold


def _fill(name: str, place: Tensor, given: Tensor) -> None:
    if place.shape != given.shape or place.dtype != given.dtype:
        wanted = f"{place.dtype} {list(place.shape)}"
        raise FormatError(f"{name} must be {wanted}, got {given.dtype} {list(given.shape)}: resume with its settings")
    place.copy_(given)


def _plain(step: PlainStep) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    rows, whole = {"silent": step.silent}, {}
    for name, weight in zip((*Weights._fields, "threshold"), step.trained, strict=False):
        moments = step.optimiser.state[weight]
        if not moments:  # as Adam makes them in its first step
            moments["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        whole[f"{name}.step"] = moments["step"]
        place = whole if name == "b_dec" else rows
        place |= {name: weight, f"{name}.m": moments["exp_avg"], f"{name}.v": moments["exp_avg_sq"]}
    return rows, whole


def _kernels(step: KernelStep) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = step.state
    rows = dict(_named("encoder", state.encoder)) | dict(_named("decoder", state.decoder))
    rows |= dict(_named("", state.latents))
    whole = {"b_dec": state.b_dec, "b_dec.m": state.b_dec_m, "b_dec.v": state.b_dec_v}
    return rows, whole | {"order": state.order, "scalars": step.scalars}


def _named(prefix: str, parts: object) -> Iterator[tuple[str, Tensor]]:
    for name, part in vars(parts).items():
        if part is not None:
            yield f"{prefix}.{name}" if prefix else name, part
