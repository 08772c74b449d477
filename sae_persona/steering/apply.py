"""Apply edits while a model runs, at the right tokens: with padding on either side, with or without a cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sae_persona.activations.hooks import Call, editing, watching
from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError
from sae_persona.sae.model import SAE
from sae_persona.steering.interventions import LatentEdit, LatentEditor, Positions, check_positions
from sae_persona.types import HookPoint

Edit = Callable[[Tensor], Tensor]


class _Where:
    """Which tokens of the forward pass now running are edited."""

    def __init__(self, lm: LM, positions: Positions, prompt_lengths: Sequence[int] | None) -> None:
        self.bos_id = lm.bos_id
        self.positions = positions
        self.given = None if prompt_lengths is None else torch.tensor(prompt_lengths)
        self.prompt: Tensor | None = None  # [b] real tokens of each row's prompt
        self.generating = False
        self.chosen = torch.empty(0, dtype=torch.bool)

    def see(self, call: Call) -> None:
        """Note a forward pass before it runs."""
        starts = self.given is None and not call.past and not (self.generating and self.prompt is not None)
        if starts:
            self.prompt = call.index[:, -1:].max(dim=1).values + 1  # what is there now is the prompt
        elif self.given is not None:
            self.prompt = self.given.to(call.index.device)
        if self.prompt is None or len(self.prompt) != len(call.index):
            got = None if self.prompt is None else len(self.prompt)
            raise ConfigError(f"prompt_lengths must have one number a row, got {got} for {len(call.index)} rows")
        last = self.prompt[:, None] - 1
        chosen = {
            "all": call.real,
            "pre": call.index == last,
            "answer": call.index >= last,
            "generated": call.index > last,
        }[self.positions]
        chosen = chosen & call.real
        if self.bos_id is not None and call.input_ids is not None:
            chosen = chosen & (call.input_ids != self.bos_id)
        self.chosen = chosen

    def edit(self, x: Tensor, change: Edit) -> Tensor:
        """Change the chosen rows of x [b, t, d_model]; the others come out bit-identical."""
        chosen = self.chosen.to(x.device)
        if not chosen.any():
            return x
        edited = x.clone()
        edited[chosen] = change(x[chosen])
        return edited


@contextmanager
def applying(
    lm: LM,
    hook: HookPoint,
    change: Edit,
    *,
    positions: Positions = "answer",
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[None]:
    """Within the block, ``lm.model`` runs with ``change`` [n, d_model] -> [n, d_model] at the chosen tokens.

    In ``generate``, the prompt is what it was given. In a plain forward pass the whole input is the prompt, unless
    ``prompt_lengths`` says how many real tokens (BOS counted, padding not) each row's prompt has.

    Hooks are gone, and ``generate`` is as it was, on any exit. Nests.
    ConfigError on unknown positions or another number of rows, ModelError if the hook point does not exist.
    """
    check_positions(positions)
    where = _Where(lm, positions, prompt_lengths)
    own: Callable[..., Any] = lm.model.generate  # pyright: ignore[reportAssignmentType]
    replaced = lm.model.__dict__.get("generate")  # set there by an outer block

    def generate(*args: Any, **kwargs: Any) -> Any:
        where.generating, where.prompt = True, None
        try:
            return own(*args, **kwargs)
        finally:
            where.generating, where.prompt = False, None

    with watching(lm, where.see), editing(lm, hook, lambda x: where.edit(x, change)):
        lm.model.generate = generate  # pyright: ignore
        try:
            yield
        finally:
            if replaced is None:
                del lm.model.generate
            else:
                lm.model.generate = replaced  # pyright: ignore


@contextmanager
def intervene(
    lm: LM,
    sae: SAE,
    edits: Sequence[LatentEdit],
    *,
    hook: HookPoint | None = None,
    positions: Positions = "answer",
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[None]:
    """Within the block, the latents of ``sae`` are edited while ``lm.model`` runs, for ``generate`` and plain forward.

    hook   by default the hook point that the SAE was trained at

    Errors as ``applying`` and ``LatentEditor``; DataError if the SAE has another width than the model.
    """
    sae.check_width(lm.d_model)
    change = LatentEditor(sae, tuple(edits))
    with applying(lm, hook or sae.hook, change, positions=positions, prompt_lengths=prompt_lengths):
        yield
