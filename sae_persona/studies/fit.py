"""Whether an SAE still reads a model: what it misses before and after a fine-tune, and a short training that helps.

    FVU = sum |x - decode(encode(x))|^2 / sum |x - mean(x)|^2

An SAE of another model, layer or scale misses about all of it, or more than there is.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_persona.activations.stream import StreamConfig, stream
from sae_persona.activations.texts import Texts
from sae_persona.errors import ConfigError, DataError
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import TopK
from sae_persona.studies.snapshots import Snapshot
from sae_persona.types import HookPoint


@torch.no_grad()
def fvu(sae: SAE, x: Tensor) -> float:
    """Fraction of the variance of x [n, d_in] that the SAE misses. NaN where x does not vary."""
    variance = (x - x.mean(0)).double().square().sum().item()
    missed = (x - sae.decode(sae.encode(x))).double().square().sum().item()
    return missed / variance if variance else math.nan


def check_fit(name: str, found: float, bound: float, *, force: bool) -> None:
    """DataError if the SAE misses more of ``name`` than ``bound``, unless forced."""
    if not found <= bound and not force:
        raise DataError(
            f"the SAE misses {found:.0%} of the variance of {name} at these prompts, at most {bound:.0%} is allowed: "
            "use one trained on this model and hook point, train it on (refit), raise max_fvu, or pass force"
        )


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """How an SAE is trained on, on a checkpoint that has drifted from it."""

    refit_steps: int = 100
    """Batches it is trained on."""
    refit_lr: float = 2e-4
    """Adam's learning rate, which falls to 0 along a line: small, so that latents stay who they are."""

    def __post_init__(self) -> None:
        if self.refit_steps < 1 or not 0 < self.refit_lr < math.inf:
            raise ConfigError(
                f"refit_steps is at least 1 and refit_lr above 0, got {self.refit_steps}, {self.refit_lr}"
            )


@dataclass(frozen=True, eq=False)
class Refit:
    """An SAE trained on, and how far each decoder direction turned: cosine [n_latents] with what it was."""

    sae: SAE
    cosine: Tensor


def refit(sae: SAE, batches: Iterable[Tensor], config: RefitConfig | None = None) -> Refit:
    """Train a copy of ``sae`` on activations [n, d_in] of the drifted model, for a few steps of squared error.

    Thresholds and which latents compete stay; rows of the decoder keep unit norm. In plain torch: this is for hundreds
    of steps. DataError for no batches, or NaN. A transcoder is refused as ``check_rebuilds`` does.
    """
    config = config or RefitConfig()
    sae.check_rebuilds()
    w_enc, b_enc, w_dec, b_dec = (
        p.detach().clone().requires_grad_() for p in (sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec)
    )
    optimizer, done = torch.optim.Adam([w_enc, b_enc, w_dec, b_dec], lr=config.refit_lr), 0
    for x in batches:
        if done == config.refit_steps:
            break
        x = x.to(w_enc.device).float()
        optimizer.param_groups[0]["lr"] = config.refit_lr * (1 - done / config.refit_steps)
        loss = (x - _acts(sae, x, w_enc, b_enc) @ w_dec - b_dec).square().sum(1).mean()
        if not bool(loss.isfinite()):
            raise DataError(f"the activations of batch {done} are not finite: nothing can be trained on them")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not isinstance(sae.rule, TopK):  # there norms may be others, see `load_sae`
            with torch.no_grad():
                w_dec /= w_dec.norm(dim=1, keepdim=True)
        done += 1
    if not done:
        raise DataError("there is no batch of activations to train the SAE on: give texts")
    made = SAE(w_enc, b_enc, w_dec, b_dec, sae.rule, {**sae.metadata, "refit_steps": done})
    return Refit(made, torch.cosine_similarity(sae.w_dec, made.w_dec, dim=1))


def _acts(sae: SAE, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> Tensor:
    """Dense activations [n, n_latents] through which gradients flow where a latent fires."""
    pre_acts = torch.nn.functional.linear(x, w_enc, b_enc)
    with torch.no_grad():
        fires = sae.rule.select(pre_acts).dense(sae.n_latents) > 0
    return pre_acts * fires


def drifted_batches(
    snapshots: Sequence[Snapshot],
    hook: HookPoint,
    texts: str | Path | Iterable[Any] | Texts,
    streaming: StreamConfig,
    steps: int,
    *,
    device: str = "cpu",
) -> list[Tensor]:
    """As many batches of activations for ``refit``, an equal share of each model, in turns.

    Models are opened one after the other, so that the batches [batch_tokens, d_model] are held in the host's memory.
    DataError if the texts give none.
    """
    share = math.ceil(steps / len(snapshots))
    parts = []
    for one in snapshots:
        batches = islice(stream(one.open(device), hook, texts, streaming), share)
        parts.append([x.float().cpu() for x in batches])
    return [part[i] for i in range(share) for part in parts if i < len(part)][:steps]
