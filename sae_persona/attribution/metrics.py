"""The metric of a contrast pair: how much likelier the model finds the persona's answer than the other one.

    m = log p(persona answer | prompt) - log p(other answer | prompt)          in nats

Each pair is two rows for the model, its sides; m is the sum over sides of sign * log p.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sae_persona.activations.dialogues import Dialogue, encode, tokenize
from sae_persona.activations.hooks import editing, model_inputs
from sae_persona.activations.lm import LM, padded
from sae_persona.attribution.contrasts import Contrast
from sae_persona.errors import ConfigError, DataError
from sae_persona.types import HookPoint

Positions = Literal["pre", "answer", "all"]
"""Tokens at which latents are set: pre: the token before the answer. answer: that one and those of the answer. all:
every token but BOS. The answer's last token is left out: nothing of the metric comes after it."""
Metric = Literal["sum", "mean"]
_HERE = {"contrast": 1.0}


@dataclass(frozen=True, eq=False)
class Side:
    """One answer to a pair's prompt.

    ids     the prompt and the answer, which begins at ``start`` and ends with the last token
    edited  positions at which latents are set
    sign    +1 for the persona's answer, -1 for the other
    """

    pair: int
    name: str
    sign: int
    ids: list[int]
    start: int
    edited: list[int]


@dataclass(frozen=True, eq=False)
class Rows:
    """Sides that share a forward pass, padded on the right.

    input_ids, mask  [b, t] int64
    row, position    [n_edited] int64   the edited tokens, side after side
    """

    sides: list[Side]
    input_ids: Tensor
    mask: Tensor
    row: Tensor
    position: Tensor


def sides_of(lm: LM, pairs: Sequence[Contrast], positions: Positions) -> list[Side]:
    """Tokenise every pair: two sides each, the persona's first.

    DataError, which names the pair, for an answer without a token or that does not fit the model; others as
    ``tokenize``.
    """
    if positions not in get_args(Positions):
        raise ConfigError(f"positions is one of {', '.join(get_args(Positions))}, got {positions!r}")
    sides = []
    for number, pair in enumerate(pairs):
        for sign, answer in ((1, pair.persona_answer), (-1, pair.other_answer)):
            name = f"pair {pair.id or number}, the answer {'with' if sign > 0 else 'without'} the persona"
            ids, start = _tokens(lm, pair, answer, name)
            if lm.n_positions is not None and len(ids) > lm.n_positions:
                raise DataError(
                    f"{name}: {start} tokens of prompt and {len(ids) - start} of answer do not fit into the "
                    f"{lm.n_positions} positions of {lm.name}: shorten it"
                )
            first = {"pre": start - 1, "answer": start - 1, "all": 0}[positions]
            edited = range(first, start if positions == "pre" else len(ids) - 1)
            sides.append(Side(number, name, sign, ids, start, [t for t in edited if t or ids[0] != lm.bos_id]))
    return sides


def _tokens(lm: LM, pair: Contrast, answer: str, name: str) -> tuple[list[int], int]:
    """Prompt and answer as one list of ids, and where the answer begins."""
    if not pair.messages:
        prompt, (more,) = encode(lm, [pair.prompt])[0], encode(lm, [answer])
        ids = [*prompt, *more[len(lm.prefix) :]]
        start, stop = len(prompt), len(ids)
    else:
        message = {"role": "assistant", "content": answer, "labels": _HERE}
        if pair.speaker is not None:
            message["name"] = pair.speaker
        tokens = tokenize(lm, Dialogue((*pair.messages, message), id=pair.id))
        spans = [(span.start, span.stop) for span in tokens.answers if span.labels is _HERE]
        start, stop = spans[0] if spans else (0, 0)
        ids = tokens.ids[:stop]
    if not 0 < start < stop:
        raise DataError(f"{name} has no token, or nothing before it: give a prompt and an answer")
    return ids, start


def batches(lm: LM, sides: Sequence[Side], size: int) -> Iterator[Rows]:
    """The sides in batches of at most ``size``, those of like length together."""
    order = sorted(sides, key=lambda side: len(side.ids))
    for at in range(0, len(order), size):
        yield rows_of(lm, order[at : at + size])


def rows_of(lm: LM, sides: list[Side]) -> Rows:
    """One batch."""
    input_ids, mask = padded(lm, [side.ids for side in sides], side="right")
    row = [i for i, side in enumerate(sides) for _ in side.edited]
    position = [t for side in sides for t in side.edited]
    return Rows(sides, input_ids, mask, *(torch.tensor(x, device=lm.device, dtype=torch.long) for x in (row, position)))


def log_likelihoods(lm: LM, rows: Rows, metric: Metric) -> Tensor:
    """log p of each side's answer given its prompt, summed or a token: [b] fp32, with a graph where x carries one."""
    logits = lm.model(**model_inputs(lm, rows.input_ids, rows.mask)).logits
    lengths = [len(side.ids) - side.start for side in rows.sides]
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(logits.device)
    at = torch.cat([torch.arange(side.start, len(side.ids)) for side in rows.sides]).to(logits.device)
    found = logits[row, at - 1].float().log_softmax(-1).gather(1, rows.input_ids[row, at][:, None])[:, 0]
    total = found.new_zeros(len(lengths)).index_add(0, row, found)
    return total / total.new_tensor(lengths) if metric == "mean" else total


def read_and_grade(
    lm: LM, hook: HookPoint, rows: Rows, metric: Metric, change: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The residual stream at the edited tokens and the gradient of log p there: [n_edited, d_in] fp32 each.

    change   what x [b, t, d_model] is replaced by at the hook point; the gradient is taken there

    One forward and one backward pass; blocks before the hook point are not differentiated. DataError if a gradient
    is not finite.
    """
    leaf: list[Tensor] = []

    def cut(x: Any) -> Tensor:
        leaf.append((x if change is None else change(x)).detach().requires_grad_())
        return leaf[0]

    with torch.enable_grad(), editing(lm, hook, cut):
        total = log_likelihoods(lm, rows, metric).sum()
        (gradient,) = torch.autograd.grad(total, leaf[0])
    x, g = (part[rows.row, rows.position].float() for part in (leaf[0].detach(), gradient))
    if not bool(g.isfinite().all()):
        bad = int(rows.row[~g.isfinite().all(dim=1)][0])
        raise DataError(
            f"{rows.sides[bad].name}: the gradient at {hook} is not finite: load the model in float32 or bfloat16"
        )
    return x, g
