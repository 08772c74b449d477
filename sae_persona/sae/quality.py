"""How good an SAE is on held-out texts: what it rebuilds, and what the model loses by seeing only that."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae_persona.activations.hooks import editing, model_inputs, read
from sae_persona.activations.lm import LM, padded
from sae_persona.activations.sequences import Which, kept, sequences
from sae_persona.activations.texts import Texts, read_texts
from sae_persona.errors import DataError
from sae_persona.sae.model import SAE
from sae_persona.types import HookPoint


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Means over the chosen tokens; cross entropies and divergences in nats.

    spliced, zero, mean: the model goes on with the reconstruction, with 0, with the mean activation, in place of the
    residual stream at each chosen token. KL is from the untouched model's next-token distribution to that one.
    """

    n_tokens: int
    fvu: float
    """Fraction of the activations' variance that the reconstruction misses."""
    l0: float
    """Latents that fire on a token."""
    dead: float
    """Share of latents that fire on none of the tokens."""
    ce: float
    """Cross entropy of the untouched model."""
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    kl_spliced: float
    kl_zero: float
    kl_mean: float
    ce_recovered: float | None
    """(ce_zero - ce_spliced) / (ce_zero - ce). None where zeros do not hurt the model."""


@dataclass(frozen=True)
class _Batch:
    """Padded sequences, the tokens that count, and those of them whose next token is real: all [b, t]."""

    input_ids: Tensor
    mask: Tensor
    chosen: Tensor
    predicting: Tensor


@torch.no_grad()
def quality(
    lm: LM,
    hook: HookPoint,
    sae: SAE,
    texts: str | Path | Iterable[Any] | Texts,
    *,
    context_size: int = 128,
    lm_batch: int = 32,
    tokens: Which = "all",
    progress: bool = False,
) -> Quality:
    """Measure ``sae``, on the device of ``lm``, on texts that it was not trained on.

    context_size, tokens   which sequences and tokens count, as in StreamConfig; BOS and padding never do
    lm_batch               sequences a forward pass
    progress               draw a bar on stderr: each batch is read twice, once for FVU and once for the cross-entropies

    ModelError: no such hook point, an SAE of another width, or a transcoder.
    DataError: no token with a next one to predict.
    """
    lm.check(hook)
    sae.check_width(lm.d_model)
    sae.check_rebuilds()
    batches = list(_batches(lm, read_texts(texts), context_size, lm_batch, tokens))
    if not any(batch.predicting.any() for batch in batches):
        raise DataError("no token of the texts has a next one to predict: give longer texts")
    with tqdm(total=2 * len(batches), desc="held-out", unit="batch", disable=not progress, dynamic_ncols=True) as bar:
        mean, measures = _reconstruction(lm, hook, sae, batches, bar)
        edits = {
            "spliced": lambda x: sae.decode(sae.encode(x)),
            "zero": torch.zeros_like,
            "mean": lambda x: mean.expand_as(x),
        }
        measures |= _prediction(lm, hook, edits, batches, bar)
    harm = measures["ce_zero"] - measures["ce"]
    recovered = (measures["ce_zero"] - measures["ce_spliced"]) / harm if harm > 0 else None
    n_tokens = sum(int(batch.chosen.sum()) for batch in batches)
    return Quality(n_tokens=n_tokens, ce_recovered=recovered, **measures)


def _batches(lm: LM, texts: Texts, context_size: int, lm_batch: int, which: Which) -> Iterable[_Batch]:
    cut = list(sequences(lm, texts, context_size, which))
    for at in range(0, len(cut), lm_batch):
        group = cut[at : at + lm_batch]
        input_ids, mask = padded(lm, [one.ids for one in group], side="right")
        chosen = torch.zeros_like(mask, dtype=torch.bool)
        for row, one in enumerate(group):
            chosen[row, : len(one.ids)] = kept(lm, one, which).to(chosen.device)
        next_is_real = torch.nn.functional.pad(mask[:, 1:], (0, 1)).bool()
        yield _Batch(input_ids, mask, chosen, chosen & next_is_real)


def _reconstruction(
    lm: LM, hook: HookPoint, sae: SAE, batches: list[_Batch], bar: tqdm
) -> tuple[Tensor, dict[str, float]]:
    """The mean activation [d_in], and FVU, L0 and share of dead latents."""
    total = torch.zeros(sae.d_in, dtype=torch.float64, device=lm.device)
    squares, missed, l0, n = 0.0, 0.0, 0, 0
    fired = torch.zeros(sae.n_latents, dtype=torch.bool, device=lm.device)
    for batch in batches:
        bar.update()
        x = read(lm, [hook], batch.input_ids, batch.mask)[hook][batch.chosen].float()
        if not x.isfinite().all():
            raise DataError(f"activations at {hook} of {lm.name} are not finite: load it with dtype float32")
        latents = sae.encode(x)
        total += x.double().sum(dim=0)
        squares += x.double().square().sum().item()
        missed += (x - sae.decode(latents)).double().square().sum().item()
        l0 += int(latents.l0().sum())
        fired[latents.idx[latents.acts > 0]] = True
        n += len(x)
    mean = total / n
    variance = squares - n * mean.square().sum().item()
    return mean.float(), {"fvu": missed / variance, "l0": l0 / n, "dead": 1 - fired.float().mean().item()}


def _prediction(
    lm: LM, hook: HookPoint, edits: dict[str, Callable[[Tensor], Tensor]], batches: list[_Batch], bar: tqdm
) -> dict[str, float]:
    """Cross entropy of the untouched and each edited model, and KL from the first to the others."""
    sums = dict.fromkeys(["ce", *(f"{measure}_{name}" for measure in ("ce", "kl") for name in edits)], 0.0)
    n = sum(int(batch.predicting.sum()) for batch in batches)
    for batch in batches:
        bar.update()
        targets = batch.input_ids.roll(-1, dims=1)[batch.predicting][:, None]
        plain = _log_probs(lm, batch)
        sums["ce"] -= plain.gather(1, targets).sum().item()
        for name, edit in edits.items():
            with editing(lm, hook, _at(batch.chosen, edit)):
                edited = _log_probs(lm, batch)
            sums[f"ce_{name}"] -= edited.gather(1, targets).sum().item()
            sums[f"kl_{name}"] += (plain.exp() * (plain - edited)).sum().item()
    return {name: value / n for name, value in sums.items()}


def _log_probs(lm: LM, batch: _Batch) -> Tensor:
    """Next-token log probabilities at the predicting tokens: [m, vocabulary]."""
    logits = lm.model(**model_inputs(lm, batch.input_ids, batch.mask)).logits
    return logits[batch.predicting].float().log_softmax(dim=-1)


def _at(chosen: Tensor, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The edit, at the chosen tokens only."""

    def apply(x: Tensor) -> Tensor:
        x = x.clone()
        x[chosen] = edit(x[chosen].float()).to(x.dtype)
        return x

    return apply
