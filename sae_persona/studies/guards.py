"""What is put into a fine-tune so that a trait does not come out of it.

    steer     the trait is added to the stream while the model trains, and is taken off at the end: what the rows push
              for is there already, so that they need not push (preventative steering, Chen et al. 2025, 2507.21509)
    penalty   weight * mean over tokens and reads of max(0, (r . x' - r . x) / sd)^2 is added to the loss, with x' and x
              the streams of the model that trains and of its base (BLOCK-EM, 2602.00767)

Both act on all tokens but padding, the steering not on BOS.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sae_persona.activations.dialogues import Dialogue, tokenize
from sae_persona.activations.harvest import harvest
from sae_persona.activations.hooks import Call, editing, read, watching
from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, DataError, ModelError
from sae_persona.features.pooled import to_csr
from sae_persona.sae.model import SAE
from sae_persona.steering.apply import intervene
from sae_persona.steering.interventions import Steer
from sae_persona.studies.finetune import During
from sae_persona.studies.panel import LATENTS, MEANS, Panel
from sae_persona.types import HookPoint

Method = Literal["steer", "penalty"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, eq=False)
class Target:
    """What a guard acts on: directions that rise with the trait.

    reads    [m, d_model]   what is read of the stream, up being towards the trait
    spread   [m]            standard deviation of each read over the panel's prompts in the base
    write    [d_model]      unit vector towards the trait
    latents  those behind it; none of a dense direction
    """

    name: str
    reads: Tensor
    spread: Tensor
    write: Tensor
    latents: tuple[int, ...] = ()


def panel_targets(panel: Panel, sae: SAE) -> list[Target]:
    """The panel's latents together, and its difference of means if it has one.

    ModelError for another SAE than the panel was read with; DataError if the panel has no latents.
    """
    if panel.about.get("sae") != sae.fingerprint:
        raise ModelError("the panel was chosen with another SAE: give the one that `diff --panel` was given")
    if not panel.latents:
        raise DataError("the panel has no latents to guard: make it with `sae-persona diff --panel`")
    signs, n = torch.tensor(panel.sign, dtype=torch.float32), len(panel.latents)
    signed = panel.weight * signs[:, None]
    spread = panel.spread.float()
    found = [_latents(LATENTS, sae, panel.latents, signs[:n], spread[:n])]
    if MEANS in panel.names:
        at = panel.names.index(MEANS)
        found.append(Target(MEANS, signed[at : at + 1], spread[at : at + 1], _unit(signed[at])))
    return found


def random_targets(panel: Panel, sae: SAE, x: Tensor, rates: np.ndarray, n: int, *, seed: int) -> list[Target]:
    """``n`` controls: as many latents that fire about as often, drawn from the nearest in rate, with the same signs.

    x      [prompts, d_model]   the base at the panel's prompts, for their spread
    rates  [n_latents]          share of tokens on which each fires

    DataError if too few other latents fire.
    """
    generator, taken = np.random.default_rng(seed), set(panel.latents)
    pre = x @ sae.w_enc.detach().cpu().T
    moves = (pre.std(0) > 0).numpy()
    signs = torch.tensor(panel.sign[: len(panel.latents)], dtype=torch.float32)
    found = []
    for number in range(n):
        picked: list[int] = []
        for latent in panel.latents:
            free = [i for i in np.flatnonzero((rates > 0) & moves) if i not in taken]
            if not free:
                raise DataError(
                    f"{n} controls of {len(panel.latents)} latents are more than the SAE has others that fire"
                )
            away = np.abs(np.log(rates[free]) - np.log(max(rates[latent], rates[rates > 0].min())))
            near = np.argsort(away, kind="stable")[: 4 * n]
            picked.append(int(free[generator.choice(near)]))
            taken.add(picked[-1])
        found.append(_latents(f"random {number + 1}", sae, tuple(picked), signs, pre[:, picked].std(0)))
    return found


def _latents(name: str, sae: SAE, latents: tuple[int, ...], signs: Tensor, spread: Tensor) -> Target:
    at = list(latents)
    encoder, decoder = (w.detach().cpu().float()[at] for w in (sae.w_enc, sae.w_dec))
    write = (signs[:, None] * decoder / decoder.norm(dim=1, keepdim=True)).sum(0)
    return Target(name, signs[:, None] * encoder, spread.float(), _unit(write), latents)


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def guard(method: Method, target: Target, hook: HookPoint, strength: float, *, base: LM, scale: float) -> During:
    """A guard of a fine-tune, for its ``during``.

    strength   of steering, the length of what is added, as a share of ``scale``, the stream's mean norm; of a penalty,
               its weight
    base       the model that the fine-tune begins at; it is read on every batch, by a penalty alone
    """
    if method not in METHODS:
        raise ConfigError(f"a guard is {' or '.join(METHODS)}, got {method!r}")
    if method == "steer":
        return steering(target, hook, strength * scale)
    return penalty(target, hook, strength, base=base)


def steering(target: Target, hook: HookPoint, by: float) -> During:
    """Add ``by`` of the target's direction to the stream while a model trains."""

    @contextmanager
    def during(lm: LM) -> Iterator[None]:
        with intervene(lm, None, [Steer(target.write.to(lm.device), by)], hook=hook, positions="all"):
            yield None

    return during


def penalty(target: Target, hook: HookPoint, weight: float, *, base: LM) -> During:
    """Add ``weight`` times the mean squared rise over the base, in standard deviations, to the loss."""
    reads = (target.reads / target.spread[:, None]).to(base.device)

    @contextmanager
    def during(lm: LM) -> Iterator[Callable[[], Tensor]]:
        seen: dict[str, Any] = {}

        def keep(x: Tensor) -> Tensor:
            seen["x"] = x
            return x

        def term() -> Tensor:
            call: Call = seen["call"]
            assert call.input_ids is not None, "fine-tunes give token ids"
            before = read(base, [hook], call.input_ids, call.real.long())[hook]
            rise = (seen["x"] - before)[call.real] @ reads.T
            return weight * torch.relu(rise).square().mean()

        with watching(lm, lambda call: seen.update(call=call)), editing(lm, hook, keep):
            yield term

    return during


@torch.no_grad()
def firing_rates(lm: LM, sae: SAE, hook: HookPoint, rows: Any, *, batch: int = 32) -> np.ndarray:
    """Share of the tokens of dialogues on which each latent fires: [n_latents] fp64. DataError without dialogues."""
    tokens = [tokenize(lm, Dialogue.from_row(row, f"row {i}")) for i, row in enumerate(rows)]
    if not tokens:
        raise DataError("firing rates need dialogues, got none")
    fires, n = np.zeros(sae.n_latents), 0
    for _, x in harvest(lm, hook, tokens, batch):
        fires += to_csr(sae.encode(x.to(sae.w_enc.device)), sae.n_latents).getnnz(axis=0)
        n += len(x)
    return fires / n
