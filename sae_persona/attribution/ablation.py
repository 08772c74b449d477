"""Exact effects: set one latent, run the model, and see what becomes of each pair's metric.

The edit is x + (c - f_i(x)) d_i at the edited tokens, so what the SAE cannot reconstruct stays. Many latents share a
forward pass, a row each; where no token of a side would change, the effect is 0 and nothing is run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_persona.activations.hooks import editing
from sae_persona.activations.lm import LM
from sae_persona.attribution.metrics import Metric, Side, batches, log_likelihoods, rows_of
from sae_persona.errors import ConfigError
from sae_persona.sae.model import SAE
from sae_persona.types import HookPoint


@dataclass(frozen=True, eq=False)
class Effects:
    """What setting each latent does to each pair.

    base     [n_pairs] fp64      metric without an edit
    change   [n_pairs, m] fp64   metric with the edit minus without; exactly 0 where the edit changes nothing
    touched  [n_pairs, m] bool   whether the edit changes anything
    """

    base: Tensor
    change: Tensor
    touched: Tensor


@torch.no_grad()
def exact_effects(
    lm: LM,
    sae: SAE,
    hook: HookPoint,
    sides: Sequence[Side],
    latents: Tensor,
    *,
    targets: Tensor | None = None,
    metric: Metric = "sum",
    batch: int = 32,
) -> Effects:
    """Set each of ``latents`` [m] alone, at the sides' edited tokens, to ``targets`` [m] (None: 0).

    In bfloat16 the log-likelihoods of one row in two batches differ by rounding; effects of that size are noise.
    """
    sae.check_width(lm.d_model)
    if unknown := [int(i) for i in latents if not 0 <= i < sae.n_latents]:
        raise ConfigError(f"latent {unknown[0]} does not exist: this SAE has latents 0 to {sae.n_latents - 1}")
    n_pairs, m = max(side.pair for side in sides) + 1, len(latents)
    base = torch.zeros(n_pairs, dtype=torch.float64)
    change, touched = torch.zeros(n_pairs, m, dtype=torch.float64), torch.zeros(n_pairs, m, dtype=torch.bool)
    jobs: list[tuple[Side, int, Tensor, float]] = []
    for side, likelihood, delta in _unedited(lm, sae, hook, sides, latents, targets, metric, batch):
        base[side.pair] += side.sign * likelihood
        moves = (delta != 0).any(0)
        touched[side.pair] |= moves
        jobs += [(side, int(j), delta[:, j], likelihood) for j in moves.nonzero()[:, 0]]
    for at in range(0, len(jobs), batch):
        part = jobs[at : at + batch]
        found = _edited(lm, sae, hook, part, latents, metric)
        for (side, j, _, before), after in zip(part, found, strict=True):
            change[side.pair, j] += side.sign * (after - before)
    return Effects(base, change, touched)


def _unedited(
    lm: LM,
    sae: SAE,
    hook: HookPoint,
    sides: Sequence[Side],
    latents: Tensor,
    targets: Tensor | None,
    metric: Metric,
    batch: int,
) -> Iterator[tuple[Side, float, Tensor]]:
    """Each side with its log-likelihood and what its edited tokens would be moved by: [n_edited, m] on the CPU."""
    for rows in batches(lm, sides, batch):
        seen: list[Tensor] = []

        def see(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return x

        with editing(lm, hook, see):
            likelihoods = log_likelihoods(lm, rows, metric).tolist()
        acts = sae.latents_at(seen[0][rows.row, rows.position].float(), latents.to(seen[0].device))
        delta = (-acts if targets is None else targets.to(acts) - acts).cpu()
        counts = [len(side.edited) for side in rows.sides]
        yield from zip(rows.sides, likelihoods, delta.split(counts), strict=True)


def _edited(
    lm: LM, sae: SAE, hook: HookPoint, jobs: list[tuple[Side, int, Tensor, float]], latents: Tensor, metric: Metric
) -> list[float]:
    """The log-likelihood of each job's side with its latent set."""
    rows = rows_of(lm, [side for side, *_ in jobs])
    delta = torch.cat([delta for _, _, delta, _ in jobs]).to(lm.device)
    direction = sae.directions(latents[[j for _, j, *_ in jobs]].to(lm.device)).float()

    def edit(x: Tensor) -> Tensor:
        moved = x.clone()
        here = x[rows.row, rows.position].float() + delta[:, None] * direction[rows.row]
        moved[rows.row, rows.position] = here.to(x.dtype)
        return moved

    with editing(lm, hook, edit):
        return log_likelihoods(lm, rows, metric).tolist()
