"""Latents that a fine-tune moved, at one hook point or several: what an edit that undoes it can be made of.

    rise_i = mean_p (w_i . x'_p - w_i . x_p)      x_p, x'_p: base and tuned at the token before the answer to prompt p

Pre-activations, as in `studies.diff`: thresholds hide what rises from below them. A latent that rose can be ablated,
capped or clamped below zero; one that fell can only be clamped up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.errors import DataError
from sae_persona.features.stats import LatentStats
from sae_persona.sae.model import SAE
from sae_persona.steering.interventions import Ablate, Ceiling, Clamp, LatentEdit, Placed
from sae_persona.steering.positions import Positions
from sae_persona.studies.fit import check_fit, fvu
from sae_persona.studies.readings import Prompt, read_prompted, together
from sae_persona.types import HookPoint

Mode = Literal["ablate", "cap", "clamp"]
MODES: tuple[Mode, ...] = ("ablate", "cap", "clamp")
"""From the mildest: to 0 where it fires, to a ceiling where it is above, to a value on the other side of 0."""
QUANTILE = 0.9
"""Of a latent's non-zero activations: the unit of strengths."""


@dataclass(frozen=True, eq=False)
class MeasuredSAE:
    """An SAE of one hook point, and how strongly its latents fire on the corpus it was measured on, if it was."""

    sae: SAE
    stats: LatentStats | None = None

    @property
    def hook(self) -> HookPoint:
        return self.sae.hook


@dataclass(frozen=True)
class Candidate:
    """A latent that may be edited; activations are means over prompts at the token before the answer."""

    hook: HookPoint
    latent: int
    rise: float
    """Of its mean pre-activation, from base to tuned; below 0 it fell."""
    unit: float
    """90th percentile of its non-zero activations."""
    base_act: float
    tuned_act: float

    @property
    def name(self) -> str:
        return f"{self.latent} at {self.hook}"

    def can(self, mode: Mode) -> bool:
        """Whether the mode can undo what happened to it."""
        return self.rise > 0 or mode == "clamp"

    def edit(self, mode: Mode, strength: float = 0.0, positions: Positions = "answer") -> Placed:
        """Undo what happened to it; the strength, in its units, is a ceiling's height or how far beyond 0."""
        edit: LatentEdit = Ablate(self.latent)
        if mode == "cap":
            edit = Ceiling(self.latent, strength, self.unit)
        if mode == "clamp":
            edit = Clamp(self.latent, strength if self.rise < 0 else -strength, self.unit)
        return Placed(edit=edit, hook=self.hook, positions=positions)


@dataclass(frozen=True, eq=False)
class Drift:
    """What a fine-tune moved. Candidates are in the order of how far they moved, in their units.

    direction   hook point -> [d_model] fp32, mean of tuned minus mean of base
    fvu         hook point -> fraction of variance that its SAE misses of the base, and of the tuned model
    """

    candidates: tuple[Candidate, ...]
    direction: Mapping[HookPoint, Tensor]
    fvu: Mapping[HookPoint, tuple[float, ...]]


def drift(
    base: LM,
    tuned: LM,
    sites: Sequence[MeasuredSAE],
    prompts: Sequence[Prompt],
    *,
    n_up: int,
    n_down: int,
    max_fvu: float,
    force: bool = False,
    batch: int = 64,
) -> Drift:
    """The latents that rose most at each hook point, ``n_up`` of each, and the ``n_down`` that fell most.

    A latent that fires neither on the measured corpus nor in the tuned model has no unit, and is left out.

    ModelError for a hook point or width that does not fit, or weights that are not finite; DataError for an SAE that
    misses more than ``max_fvu`` of the base's variance, unless forced, or if no latent moved.
    """
    found: list[Candidate] = []
    direction, missed = {}, {}
    for site in sites:
        site.sae.check_width(base.d_model)
        site.sae.check_rebuilds()
        readings = together([read_prompted(lm, site.hook, prompts, batch=batch) for lm in (base, tuned)])
        before, after = (one.x for one in readings)
        missed[site.hook] = tuple(fvu(site.sae, x.to(site.sae.w_enc.device)) for x in (before, after))
        # only the base's SAE must be the base's: how far the tuned model has left it is a part of what is measured
        check_fit(base.name, missed[site.hook][0], max_fvu, force=force)
        direction[site.hook] = (after.double().mean(0) - before.double().mean(0)).float()
        found += _moved(site, before, after, n_up, n_down)
    if not found:
        raise DataError(f"no latent differs between {base.name} and {tuned.name} at these prompts: nothing to reverse")
    return Drift(tuple(sorted(found, key=lambda one: -abs(one.rise) / one.unit)), direction, missed)


@torch.no_grad()
def _moved(site: MeasuredSAE, before: Tensor, after: Tensor, n_up: int, n_down: int) -> list[Candidate]:
    sae, place = site.sae, site.sae.w_enc.device
    before, after = before.to(place), after.to(place)
    rise = (sae.pre_acts(after) - sae.pre_acts(before)).double().mean(0)
    acts = [sae.encode(x) for x in (before, after)]
    stats = LatentStats(sae.n_latents, place)
    stats.update(acts[1])
    unit = stats.quantile(QUANTILE)
    if site.stats is not None:
        measured = site.stats.quantile(QUANTILE).to(unit)
        unit = torch.where(measured.isnan(), unit, measured)
    means = [_means(one.acts, one.idx, len(before), sae.n_latents) for one in acts]
    known = unit.isfinite() & (unit > 0)
    picked = []
    for sign, n in ((1, n_up), (-1, n_down)):
        moved = torch.where(known & (sign * rise > 0), sign * rise, -torch.inf)
        best = moved.topk(min(n, sae.n_latents))
        picked += [int(i) for i, value in zip(best.indices, best.values, strict=True) if value > -torch.inf]
    return [
        Candidate(site.hook, i, float(rise[i]), float(unit[i]), float(means[0][i]), float(means[1][i])) for i in picked
    ]


def _means(acts: Tensor, idx: Tensor, n: int, n_latents: int) -> Tensor:
    return acts.new_zeros(n_latents).index_add_(0, idx.flatten(), acts.flatten()) / n
