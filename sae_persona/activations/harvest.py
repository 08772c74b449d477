"""Sequences through the model: the activations of each, and those of whole groups."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from sae_persona.activations.dialogues import Tokens
from sae_persona.activations.groups import FORWARDS, Group
from sae_persona.activations.hooks import read, read_rows
from sae_persona.activations.lm import LM, padded
from sae_persona.errors import DataError
from sae_persona.types import HookPoint


def harvest(lm: LM, hook: HookPoint, tokens: Iterable[Tokens], lm_batch: int) -> Iterator[tuple[Tokens, Tensor]]:
    """Each sequence with its activations [t, d_model] fp32, BOS included, in the order given.

    Sequences of like length share a forward pass of ``lm_batch``. DataError where an activation is not finite.
    """
    source = iter(tokens)
    while group := list(islice(source, FORWARDS * lm_batch)):
        by_length = sorted(range(len(group)), key=lambda i: len(group[i].ids))
        found: dict[int, Tensor] = {}
        for at in range(0, len(group), lm_batch):
            rows = by_length[at : at + lm_batch]
            found.update(zip(rows, _activations(lm, hook, [group[i] for i in rows]), strict=True))
        for i, one in enumerate(group):
            yield one, found.pop(i)


def read_group(lm: LM, hooks: Sequence[HookPoint], group: Group) -> dict[HookPoint, Tensor]:
    """The kept activations of a group at each hook point: [n, d_model] in the model's dtype, in the group's order."""
    rows: dict[HookPoint, Tensor] = {}
    for forward in group.forwards:
        ids, position, segment, bounds, source, target = (
            x.to(lm.device, non_blocking=True)
            for x in (
                forward.input_ids, forward.position, forward.segment, forward.bounds, forward.source, forward.target
            )
        )  # fmt: skip
        if forward.packed or lm.device.type == "cuda":
            acts = read_rows(lm, hooks, ids, position, segment, bounds if forward.packed else None)
        else:  # on a CPU a mask costs nothing
            acts = read(lm, hooks, ids, (segment >= 0).long())
        for hook, x in acts.items():
            if hook not in rows:
                rows[hook] = x.new_empty(group.n, x.shape[-1])
            rows[hook].index_copy_(0, target, x.flatten(0, 1).index_select(0, source))
    return rows


def is_finite(rows: Tensor) -> Tensor:
    """Whether each of the rows [n, d] is: bool [n]. One reading, no copy in fp32."""
    return torch.linalg.vector_norm(rows, ord=torch.inf, dim=1).isfinite()


def not_finite(lm: LM, hook: HookPoint, tokens: Tokens) -> DataError:
    """What to raise for a sequence whose activations are not finite."""
    start = lm.tokenizer.decode(tokens.ids[:12])
    return DataError(f"activations at {hook} of {lm.name} are not finite in {start!r}: load it with dtype float32")


def _activations(lm: LM, hook: HookPoint, batch: Sequence[Tokens]) -> list[Tensor]:
    # on the right, where causal attention cannot see padding whatever the model does with positions
    input_ids, mask = padded(lm, [one.ids for one in batch], side="right")
    acts = read(lm, [hook], input_ids, mask)[hook].float()
    broken = (~acts.isfinite().all(dim=-1) & mask.bool()).any(dim=-1)
    if broken.any():
        raise not_finite(lm, hook, batch[int(broken.int().argmax())])
    return [acts[row, : len(one.ids)] for row, one in enumerate(batch)]
