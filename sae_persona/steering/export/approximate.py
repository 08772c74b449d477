"""A direction in place of edits that a format cannot say, and what is lost by it, measured.

For each hook point the answers of the edited model to some prompts are passed through it, and what the edits add at
their tokens is noted: delta [n, d_model]. Their mean v is added instead, at every token, for formats know no others:

    explained   1 - sum |delta - v|^2 / sum |delta|^2      1 where the edits add a constant; of the same prompts
    kl          mean over tokens of held-out answers of KL(edited || approximated) of the next token, nats
    kl_plain    likewise of the model without edits: what an approximation that does nothing loses
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sae_persona.activations.hooks import editing, model_inputs, watching
from sae_persona.activations.lm import LM, padded
from sae_persona.errors import ConfigError, DataError
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.bench import Messages, halves
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Placed, Steer
from sae_persona.steering.positions import Where
from sae_persona.types import HookPoint

MOST_TOKENS = 200_000


@dataclass(frozen=True, kw_only=True)
class ApproximateConfig:
    """How the loss of an approximation is measured."""

    max_new_tokens: int = 16
    """Tokens of each answer that the edits are measured on, greedy."""
    batch: int = 64
    """Prompts a forward pass."""

    def __post_init__(self) -> None:
        AnswerConfig(max_new_tokens=self.max_new_tokens, batch=self.batch)


@torch.no_grad()
def approximate(
    intervention: Intervention,
    lm: LM,
    prompts: Sequence[list[int]],
    held_out: Sequence[list[int]],
    config: ApproximateConfig | None = None,
) -> Intervention:
    """An intervention that adds one direction at each hook point, at every token, in place of the edits.

    prompts, held_out   token ids, as `answer` takes them: the direction is of the former, the KL of the latter

    DataError without prompts of both kinds, or where the edits change nothing on them.
    """
    config = config or ApproximateConfig()
    if not prompts or not held_out:
        raise DataError(f"an approximation needs prompts and others held out, got {len(prompts)} and {len(held_out)}")
    whole = _answered(intervention, lm, prompts, config)
    deltas = {hook: [] for hook in intervention.hooks}
    _pass(intervention, lm, whole, config, deltas=deltas)
    edits, explained, energy = [], 0.0, 0.0
    for hook, parts in deltas.items():
        delta = torch.cat(parts).double()
        v = delta.mean(dim=0) if len(delta) else delta.new_zeros(lm.d_model)
        if not v.norm() > 0:
            raise DataError(f"the edits at {hook} change nothing on these prompts: give others, on which they act")
        edits.append(Placed(edit=Steer(v.float(), 1.0), hook=hook, positions="every"))
        energy += float(delta.square().sum())
        explained += float(delta.square().sum() - (delta - v).square().sum())
    made = replace(intervention, edits=tuple(edits), parts={})
    lost = _lost(intervention, made, lm, held_out, config)
    said = [f"{one.edit.name} at {one.positions}" for one in intervention.edits]
    facts = {"stands_for": said, "explained": explained / energy, **lost, "prompts": len(prompts)}
    return replace(made, approximation=facts)


def _lost(
    true: Intervention, made: Intervention, lm: LM, prompts: Sequence[list[int]], config: ApproximateConfig
) -> Any:
    whole = _answered(true, lm, prompts, config)
    wanted, got, plain = (_pass(which, lm, whole, config) for which in (true, made, None))

    def kl(other: Tensor) -> float:
        return float((wanted.exp() * (wanted - other)).sum(dim=-1).mean())

    return {"kl": kl(got), "kl_plain": kl(plain), "held_out_prompts": len(prompts), "held_out_tokens": len(wanted)}


def _answered(
    intervention: Intervention, lm: LM, prompts: Sequence[list[int]], config: ApproximateConfig
) -> list[tuple[list[int], int]]:
    """Prompts with what the edited model answers, and how many tokens the prompt has."""
    greedy = AnswerConfig(temperature=0.0, max_new_tokens=config.max_new_tokens, batch=config.batch)
    with intervention.applied(lm):
        answers = answer(lm, prompts, greedy)
    return [(prompt + a.ids, len(prompt)) for prompt, a in zip(prompts, answers, strict=True)]


def _pass(
    intervention: Intervention | None,
    lm: LM,
    whole: Sequence[tuple[list[int], int]],
    config: ApproximateConfig,
    deltas: dict[HookPoint, list[Tensor]] | None = None,
) -> Tensor:
    """Log-probabilities of the next token at each token of the answers but the last, and the one before: [n, n_tokens].

    deltas   filled with what the edits add at the tokens that they are for
    """
    found = []
    for at in range(0, len(whole), config.batch):
        rows = whole[at : at + config.batch]
        ids, mask = padded(lm, [tokens for tokens, _ in rows], side="right")
        lengths = [n for _, n in rows]
        where = Where(lm.bos_id, lengths)
        with ExitStack() as stack:
            before: dict[HookPoint, Tensor] = {}
            if deltas is not None and intervention is not None:
                stack.enter_context(watching(lm, where.see))
                for hook in deltas:
                    stack.enter_context(editing(lm, hook, _keep(before, hook)))
            stack.enter_context(
                nullcontext() if intervention is None else intervention.applied(lm, prompt_lengths=lengths)
            )
            if deltas is not None and intervention is not None:
                for hook, parts in deltas.items():
                    stack.enter_context(editing(lm, hook, _difference(before, hook, parts, where, intervention)))
            logits = lm.model(**model_inputs(lm, ids, mask)).logits
        if deltas is None:
            log_p = logits.float().log_softmax(dim=-1)
            found += [log_p[i, n - 1 : len(tokens) - 1] for i, (tokens, n) in enumerate(rows)]
    return torch.cat(found) if found else torch.empty(0)


def _keep(before: dict[HookPoint, Tensor], hook: HookPoint) -> Callable[[Tensor], Tensor]:
    def visit(x: Tensor) -> Tensor:
        before[hook] = x
        return x

    return visit


def _difference(
    before: dict[HookPoint, Tensor], hook: HookPoint, parts: list[Tensor], where: Where, intervention: Intervention
) -> Callable[[Tensor], Tensor]:
    def visit(x: Tensor) -> Tensor:
        chosen = [where.chosen(one.positions) for one in intervention.edits if one.hook == hook]
        at = torch.stack(chosen).any(dim=0)
        kept = sum(map(len, parts))
        parts.append((x - before[hook])[at][: max(0, MOST_TOKENS - kept)].float().cpu())
        return x

    return visit


def check_prompts(chats: Sequence[Messages] | None) -> None:
    """ConfigError if there are some, and they cannot be split in two, see `halves`."""
    if chats is not None and not all(halves(chats)):
        n = len(halves(chats)[0]) and 1
        raise ConfigError(f"an approximation needs at least 2 different prompts, half of them held out, got {n}")
