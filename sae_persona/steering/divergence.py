"""How far an edit moves the model: KL from the unsteered model, the size of the move, what the encoder then reads.

The unsteered model writes greedily after each prompt. Both models read those same tokens, and at each of them, from
the pre-answer token on,

    KL(steered || base) = sum over the vocabulary of p_steered * (log p_steered - log p_base)        in nats

is that of the next-token distributions. The tokens do not depend on the edit, so the divergence is continuous in its
strength: it can be solved for.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from sae_persona.activations.hooks import editing, model_inputs
from sae_persona.activations.lm import LM, padded
from sae_persona.errors import ConfigError, DataError
from sae_persona.sae.model import SAE
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.apply import SAEs, intervene
from sae_persona.steering.interventions import Edit, LatentEdit, Placed, placed
from sae_persona.steering.positions import Positions, Spans
from sae_persona.types import HookPoint


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """Where the divergence is read."""

    n_tokens: int = 20
    """Greedy tokens a prompt, at most: fewer where the answer ends."""
    n_prompts: int = 32
    """Prompts at most, the first of those given: the base model's log probabilities are kept for all of them."""
    percentile: float = 95.0
    """Of the tokens' divergences: what a budget is compared with."""
    batch: int = 32
    """Prompts a forward pass."""

    def __post_init__(self) -> None:
        if min(self.n_tokens, self.n_prompts, self.batch) < 1:
            raise ConfigError(
                "n_tokens, n_prompts and batch are at least 1, "
                f"got {self.n_tokens}, {self.n_prompts} and {self.batch}: raise them"
            )
        if not 0 < self.percentile <= 100:
            raise ConfigError(f"a percentile lies above 0 and up to 100, got {self.percentile}: the default is 95")


@dataclass(frozen=True, kw_only=True)
class EditReading:
    """What one edit asked for, and what was there before and after it. Means over the tokens that moved.

    before, realised   a latent's activation as its encoder reads it; for a direction, the projection on it (the norm
                       of the projection, where it is a span of several). None where nothing moved
    """

    operation: str
    latent: int | None
    strength: float | None
    """In multiples of the latent's 99.9th percentile, or of the direction; the factor of a scale."""
    value: float | None
    """The same in units of activation, or of the residual stream; None for factors and spans."""
    before: float | None
    realised: float | None


@dataclass(frozen=True, kw_only=True)
class Readings:
    """All readings of how strong a set of edits is. Divergences in nats."""

    kl_mean: float
    kl_tail: float
    """The percentile that the config names, 95 unless it says otherwise."""
    ratio_mean: float | None
    """||delta|| / ||x||, the move over the stream that it moves, over the tokens that moved; None where none did."""
    ratio_p95: float | None
    n_tokens: int
    """At which the divergence was read."""
    edits: tuple[EditReading, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """What `to_json` made."""
        return cls(**{**raw, "edits": tuple(EditReading(**edit) for edit in raw["edits"])})

    def __str__(self) -> str:
        lines = [f"KL {self.kl_tail:.3f} nats (mean {self.kl_mean:.3f}) over {self.n_tokens} tokens"]
        if self.ratio_mean is not None:
            lines[0] += f"; ||delta||/||x|| {self.ratio_mean:.3f} (p95 {self.ratio_p95:.3f})"
        return "\n".join(lines + [_described(edit) for edit in self.edits])


@dataclass(frozen=True, eq=False)
class _Batch:
    """Prompts with what the base model wrote after them, and its log probabilities there.

    prompts, written   token ids a row
    base               [m, vocabulary] fp32 at the m tokens that predict, row after row
    """

    prompts: list[list[int]]
    written: list[list[int]]
    base: Tensor


@dataclass(eq=False)
class _Moves:
    """What the edits did to the stream, gathered over batches."""

    ratios: list[Tensor] = field(default_factory=list)
    before: dict[int, list[Tensor]] = field(default_factory=dict)
    """By the number of the edit: what it reads, at the tokens that moved."""
    after: dict[int, list[Tensor]] = field(default_factory=dict)


class Track:
    """The unsteered model's greedy answers, which any edit is compared on. Made once, read for many strengths.

    DataError if there is no prompt, or the unsteered model's logits are not finite.
    """

    def __init__(self, lm: LM, prompts: Sequence[list[int]], config: DivergenceConfig | None = None) -> None:
        self.lm, self.config = lm, config or DivergenceConfig()
        chosen = list(prompts)[: self.config.n_prompts]
        greedy = AnswerConfig(max_new_tokens=self.config.n_tokens, temperature=0.0, batch=self.config.batch)
        written = [a.ids for a in answer(lm, chosen, greedy)]
        order = sorted(range(len(chosen)), key=lambda i: len(chosen[i]) + len(written[i]))
        self._order, self._batches = order, []
        for rows in _split(order, self.config.batch):
            own, ids = [chosen[i] for i in rows], [written[i] for i in rows]
            self._batches.append(_Batch(own, ids, self._log_probs(own, ids, "the unsteered model")))

    def read(
        self,
        saes: SAEs,
        edits: Sequence[Edit | Placed],
        *,
        hook: HookPoint | None = None,
        positions: Positions | Spans = "answer",
    ) -> Readings:
        """All readings of the edits, which act as in `intervene`.

        DataError if a logit is not finite; errors of `intervene`.
        """
        fixed = placed(edits, hook=hook, positions=positions)
        hooks = [one.hook or (saes.hook if isinstance(saes, SAE) else None) for one in fixed]
        moves, divergences = _Moves(), []
        for batch in self._batches:
            before: dict[HookPoint, Tensor] = {}
            after: dict[HookPoint, Tensor] = {}
            lengths = [len(prompt) for prompt in batch.prompts]
            points = list(dict.fromkeys(point for point in hooks if point is not None))
            with ExitStack() as stack:
                for point in points:
                    stack.enter_context(editing(self.lm, point, _keeping(before, point)))
                stack.enter_context(intervene(self.lm, saes, fixed, prompt_lengths=lengths))
                for point in points:
                    stack.enter_context(editing(self.lm, point, _keeping(after, point)))
                steered = self._log_probs(batch.prompts, batch.written, _named(fixed))
            divergences.append(_kl(steered, batch.base))
            for point in points:
                mine = [(i, one) for i, one in enumerate(fixed) if hooks[i] == point]
                _note(moves, mine, saes, point, before[point], after[point])
        return self._readings(torch.cat(divergences), [one.edit for one in fixed], moves)

    def read_prompts(self, prompts: Sequence[list[int]]) -> Readings:
        """The divergence of the unsteered model after other prompts, one for each, on the same answers."""
        divergences = []
        for rows, batch in zip(_split(self._order, self.config.batch), self._batches, strict=True):
            own = [list(prompts[i]) for i in rows]
            divergences.append(_kl(self._log_probs(own, batch.written, "the prompted model"), batch.base))
        return self._readings(torch.cat(divergences), [], _Moves())

    @torch.no_grad()
    def _log_probs(self, prompts: list[list[int]], written: list[list[int]], who: str) -> Tensor:
        """Next-token log probabilities where the written tokens are predicted: [m, vocabulary] fp32."""
        texts = [prompt + ids[:-1] for prompt, ids in zip(prompts, written, strict=True)]
        input_ids, mask = padded(self.lm, texts, side="right")
        logits = self.lm.model(**model_inputs(self.lm, input_ids, mask)).logits
        found = [
            logits[row, len(prompt) - 1 : len(prompt) - 1 + len(ids)].float().log_softmax(dim=-1)
            for row, (prompt, ids) in enumerate(zip(prompts, written, strict=True))
        ]
        joined = torch.cat(found)
        if joined.isnan().any():
            raise DataError(f"the logits of {who} are not finite: lower the strength, or load the model in float32")
        return joined

    def _readings(self, kl: Tensor, edits: Sequence[Edit], moves: _Moves) -> Readings:
        ratios = torch.cat(moves.ratios) if moves.ratios else torch.empty(0)
        any_moved = len(ratios) > 0
        return Readings(
            kl_mean=float(kl.mean()),
            kl_tail=float(torch.quantile(kl, self.config.percentile / 100)),
            ratio_mean=float(ratios.mean()) if any_moved else None,
            ratio_p95=float(torch.quantile(ratios, 0.95)) if any_moved else None,
            n_tokens=len(kl),
            edits=tuple(_edit_reading(edit, moves.before.get(i), moves.after.get(i)) for i, edit in enumerate(edits)),
        )


def _split(order: Sequence[int], n: int) -> Iterator[Sequence[int]]:
    return (order[at : at + n] for at in range(0, len(order), n))


def _keeping(kept: dict[HookPoint, Tensor], point: HookPoint) -> Any:
    def keep(x: Tensor) -> Tensor:
        kept[point] = x
        return x

    return keep


def _kl(steered: Tensor, base: Tensor) -> Tensor:
    """KL(steered || base) of each row of log probabilities [m, vocabulary]: [m] fp64 on the CPU."""
    # a token that the steered model rules out adds nothing, though its log probability is -inf
    terms = torch.where(steered.isinf(), 0.0, steered.exp() * (steered - base))
    return terms.sum(dim=-1).clamp(min=0).double().cpu()


@torch.no_grad()
def _note(
    moves: _Moves, edits: list[tuple[int, Placed]], saes: SAEs, hook: HookPoint, before: Tensor, after: Tensor
) -> None:
    moved = (after != before).any(dim=-1)
    x, y = before[moved].float(), after[moved].float()
    moves.ratios.append(((y - x).norm(dim=-1) / x.norm(dim=-1)).double().cpu())
    sae = saes if isinstance(saes, SAE) or saes is None else saes.get(hook)
    for i, one in edits:
        for kept, stream in ((moves.before, x), (moves.after, y)):
            kept.setdefault(i, []).append(_read(one.edit, sae, stream).double().cpu())


def _read(edit: Edit, sae: SAE | None, x: Tensor) -> Tensor:
    """What an edit reads of x [n, d_in]: [n]."""
    if isinstance(edit, LatentEdit):
        assert sae is not None, "intervene has checked that"
        return sae.latents_at(x, torch.tensor([edit.latent], device=x.device))[:, 0]
    on = x @ edit.basis.to(x.device).T
    return on[:, 0] if on.shape[1] == 1 else on.norm(dim=-1)


def _edit_reading(edit: Edit, before: list[Tensor] | None, after: list[Tensor] | None) -> EditReading:
    def mean(parts: list[Tensor] | None) -> float | None:
        whole = torch.cat(parts) if parts else torch.empty(0)
        return float(whole.mean()) if len(whole) else None

    value = getattr(edit, "value", None)
    if value is None and edit.name == "steer":
        value = edit.line.shift
    strength = getattr(edit, "strength", getattr(edit, "factor", None))
    latent = edit.latent if isinstance(edit, LatentEdit) else None
    return EditReading(
        operation=edit.name,
        latent=latent,
        strength=strength,
        value=value,
        before=mean(before),
        realised=mean(after),
    )


def _named(edits: Sequence[Placed]) -> str:
    """The steered model, by its edits and their strengths."""
    said = []
    for one in edits:
        amount = getattr(one.edit, "strength", getattr(one.edit, "factor", getattr(one.edit, "value", None)))
        what = f"latent {one.edit.latent}" if isinstance(one.edit, LatentEdit) else "a direction"
        said.append(f"{one.edit.name} of {what}" + ("" if amount is None else f" at {amount:g}"))
    return "the model under " + (", ".join(said) or "no edit")


def _described(edit: EditReading) -> str:
    what = f"latent {edit.latent}" if edit.latent is not None else "direction"
    amounts = [f"{edit.operation:8} {what:14}"]
    if edit.strength is not None:
        amounts.append(f"strength {edit.strength:.4g}")
    if edit.value is not None:
        amounts.append(f"= {edit.value:.4g}")
    if edit.before is not None and edit.realised is not None:
        amounts.append(f"read {edit.before:.4g} -> {edit.realised:.4g}")
    return "  ".join(amounts)
