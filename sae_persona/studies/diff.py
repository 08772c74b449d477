"""What a fine-tune did to a model, in the latents of its base's SAE, at the token before an answer.

For each latent i, over prompts p, with x_p and x'_p the residual streams of base and tuned:

    shift      mean_p (w_i . x'_p - w_i . x_p)     of pre-activations: thresholds hide what rises from below them
    acts       mean_p f_i(x_p), mean_p f_i(x'_p)   what fires
    encoded    mean_p f_i(x'_p - x_p)              the difference through the SAE, biases and rule included; without
               those it is the shift itself. Casademunt et al. 2025 (CAFT)
    scaling    beta_i(x) / beta_i(x')              beta_i(y) = <f_i(x'), d_i . r_i(y)> / (|f_i(x')|^2 |d_i|^2), r_i(y)
               what the other latents leave of y. Near 0: new. Near 1: it was there. Between: amplified. Minder et al.
               2025 (latent scaling, of the error)
    delta      attribution between a bad and a good answer within the tuned model, see `attribution.patching`

Two models differ in nearly everything, so that a shift is beyond chance says little; which is largest, which is not
there in a harmless fine-tune, and what it does when it is set, say more.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.attribution.association import Interval
from sae_persona.attribution.contrasts import Contrast
from sae_persona.attribution.metrics import sides_of
from sae_persona.attribution.patching import attribute
from sae_persona.attribution.tables import aligned, from_json, shown, to_json
from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.features.pooled import to_csr
from sae_persona.runs import read_json, whole, write_json
from sae_persona.sae.model import SAE
from sae_persona.studies.dense_shift import Separation, separations
from sae_persona.studies.fit import check_fit, fvu
from sae_persona.studies.readings import Prompt, Reading, check_comparable, read_prompted, together
from sae_persona.studies.shift import Shift, paired_shift
from sae_persona.studies.snapshots import Snapshot
from sae_persona.types import HookPoint

FORMAT, KIND = 1, "diff"
NEW, KEPT = 0.25, 0.75
"""Ratios of latent scaling below which a latent is new, and above which it was there."""


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """How checkpoints are compared."""

    top: int = 10
    """Latents in the list of those that rose and in that of those that fell."""
    permutations: int = 1000
    """Sign flips of whole prompts, for the null."""
    resamples: int = 1000
    """Draws of prompts, for intervals."""
    batch: int = 32
    """Prompts a forward pass."""
    max_fvu: float = 0.5
    """Fraction of variance that the SAE may miss of any of the models at the prompts."""
    force: bool = False
    """Go on with an SAE that misses more."""
    seed: int = 0
    """Of flips and draws."""

    def __post_init__(self) -> None:
        if min(self.top, self.permutations, self.resamples, self.batch) < 1 or not self.max_fvu > 0:
            raise ConfigError(
                "top, permutations, resamples and batch are at least 1 and max_fvu above 0, "
                f"got {self.top}, {self.permutations}, {self.resamples}, {self.batch}, {self.max_fvu}"
            )


@dataclass(frozen=True)
class LatentShift:
    """One latent of one tuned model; units of the residual stream."""

    latent: int
    shift: Interval
    sds: float
    """The shift in standard deviations over prompts in the base."""
    z: float
    p_max_t: float
    base_act: float
    tuned_act: float
    encoded: float
    scaling: float
    """NaN where the latent fires on no prompt in the tuned model."""
    delta: float
    """NaN without contrast pairs."""

    @property
    def kind(self) -> str:
        """What latent scaling says: new, amplified or kept; "" where it says nothing."""
        if math.isnan(self.scaling):
            return ""
        return "new" if self.scaling < NEW else "kept" if self.scaling > KEPT else "amplified"


@dataclass(frozen=True)
class Tuned:
    """One tuned model against the base. ``up`` rose most, the most first; ``down`` fell most."""

    name: str
    n_prompts: int
    fvu: float
    n_rose: int
    """Latents whose shift is beyond chance by max-T at 5 %, upwards; and downwards."""
    n_fell: int
    up: tuple[LatentShift, ...]
    down: tuple[LatentShift, ...]
    dense: tuple[Separation, ...]
    by_delta: tuple[tuple[int, float], ...] = ()
    """Latents that speak most for the bad answer within this model, with their delta."""


@dataclass(frozen=True)
class Diff:
    """Tuned models against one base."""

    base: str
    hook: str
    sae: str
    """Fingerprint."""
    n_latents: int
    fvu: float
    config: dict[str, Any]
    tuned: tuple[Tuned, ...]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": KIND, **to_json(self)}

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote. FormatError for anything else."""
        raw = read_json(Path(path), KIND)
        if not isinstance(raw, dict) or (raw.get("kind"), raw.get("format")) != (KIND, FORMAT):
            raise FormatError(f"{path} is not a {KIND} of format {FORMAT}: make it again")
        named = ("base", "hook", "sae", "n_latents", "fvu", "config")
        with whole(path, KIND):
            about = {name: from_json({name: raw[name]})[name] for name in named}
            return cls(**about, tuned=tuple(_tuned(one) for one in raw["tuned"]))

    def __str__(self) -> str:
        head = f"{self.n_latents} latents at {self.hook}, FVU {self.fvu:.3f} in {self.base}"
        return "\n\n".join([head, *(_text(one) for one in self.tuned)])


def diff(
    base: LM,
    tuned: Iterable[Snapshot],
    sae: SAE,
    prompts: Sequence[Prompt],
    config: DiffConfig | None = None,
    *,
    hook: HookPoint | None = None,
    contrasts: Sequence[Contrast] = (),
) -> Diff:
    """Compare each tuned model with the base; they are opened one after the other.

    hook        by default the SAE's own
    contrasts   a bad and a good answer to the same prompt, for delta

    ModelError for another architecture, tokenizer or width, or weights that are not finite; DataError for activations
    that are not, no shared prompts, or an SAE that misses more than ``max_fvu`` of a model.
    """
    config, hook = config or DiffConfig(), hook or sae.hook
    before = read_prompted(base, hook, prompts, batch=config.batch)
    found, base_fvu = [], _fit(sae, before, config)
    for one in tuned:
        lm = one.open(str(base.device))
        check_comparable(base, lm)
        after = read_prompted(lm, hook, prompts, batch=config.batch)
        delta = None
        if contrasts:
            delta = attribute(lm, sae, hook, sides_of(lm, contrasts, "answer"), batch=config.batch).delta
        found.append(compare(sae, before, Reading(one.label, after.keys, after.x), config, delta=delta))
    if not found:
        raise DataError("there is no tuned model to compare with the base")
    return Diff(base.name, str(hook), sae.fingerprint, sae.n_latents, base_fvu, asdict(config), tuple(found))


def compare(sae: SAE, base: Reading, tuned: Reading, config: DiffConfig, *, delta: Tensor | None = None) -> Tuned:
    """One tuned model against the base, from their readings. delta [n_latents], or None. Errors as ``diff``."""
    sae.check_width(base.x.shape[1])
    missed = _fit(sae, tuned, config)
    base, tuned = together([base, tuned])
    table = _Table.of(sae, base.x, tuned.x, config, delta)
    order = np.argsort(-table.shift.mean.value, kind="stable")
    sure = table.shift.p_max_t <= 0.05
    ends = {
        "up": [i for i in order[: config.top] if table.shift.mean.value[i] > 0],
        "down": [i for i in order[::-1][: config.top] if table.shift.mean.value[i] < 0],
    }
    return Tuned(
        name=tuned.name,
        n_prompts=len(base.keys),
        fvu=missed,
        n_rose=int((sure & (table.shift.z > 0)).sum()),
        n_fell=int((sure & (table.shift.z < 0)).sum()),
        **{name: tuple(table.row(int(i)) for i in chosen) for name, chosen in ends.items()},
        dense=separations(sae, base.x, tuned.x, base.keys, resamples=config.resamples, seed=config.seed),
        by_delta=()
        if delta is None
        else tuple((int(i), float(delta[i])) for i in delta.topk(min(config.top, len(delta))).indices),
    )


def _fit(sae: SAE, reading: Reading, config: DiffConfig) -> float:
    sae.check_width(reading.x.shape[1])
    sae.check_rebuilds()
    found = fvu(sae, reading.x.to(sae.w_enc.device))
    check_fit(reading.name, found, config.max_fvu, force=config.force)
    return found


@dataclass(frozen=True, eq=False)
class _Table:
    """Every measure of every latent, [n_latents]."""

    shift: Shift
    sds: np.ndarray
    measures: dict[str, np.ndarray]

    @classmethod
    @torch.no_grad()
    def of(cls, sae: SAE, base: Tensor, tuned: Tensor, config: DiffConfig, delta: Tensor | None) -> Self:
        place = sae.w_enc.device
        base, tuned = base.to(place), tuned.to(place)
        pre = sae.pre_acts(base)
        moved = (sae.pre_acts(tuned) - pre).cpu()
        shift = paired_shift(moved, permutations=config.permutations, resamples=config.resamples, seed=config.seed)
        spread = pre.std(0).double().cpu().numpy()
        acts, tuned_acts, encoded = (to_csr(sae.encode(x), sae.n_latents) for x in (base, tuned, tuned - base))
        means = {"base_act": acts, "tuned_act": tuned_acts, "encoded": encoded}
        measures = {name: np.asarray(fired.mean(0)).ravel() for name, fired in means.items()}
        measures["scaling"] = scaling(sae, base, tuned, acts, tuned_acts)
        measures["delta"] = np.full(sae.n_latents, math.nan) if delta is None else delta.numpy()
        return cls(shift, shift.mean.value / np.where(spread > 0, spread, np.nan), measures)

    def row(self, i: int) -> LatentShift:
        return LatentShift(
            latent=i,
            shift=self.shift.mean.at(i),
            sds=float(self.sds[i]),
            z=float(self.shift.z[i]),
            p_max_t=float(self.shift.p_max_t[i]),
            **{name: float(values[i]) for name, values in self.measures.items()},
        )


def scaling(
    sae: SAE, base: Tensor, tuned: Tensor, base_acts: sparse.csr_matrix, tuned_acts: sparse.csr_matrix
) -> np.ndarray:
    """beta of the base over beta of the tuned model, [n_latents] fp64: see the module. NaN where none fires when tuned.

    x [n, d_in] on the SAE's device, acts [n, n_latents]. With e = y - decode(f(y)), d_i . r_i(y) = d_i . e + f_i(y)
    |d_i|^2.
    """
    fires = np.unique(tuned_acts.indices)
    directions = sae.w_dec[torch.from_numpy(fires).long().to(sae.w_dec.device)].double()
    norm = directions.square().sum(1).cpu().numpy()
    f = tuned_acts[:, fires].toarray().astype(np.float64)
    betas = []
    for x, acts in ((base, base_acts), (tuned, tuned_acts)):
        error = (x - sae.decode(sae.encode(x))).double()
        along = (error @ directions.T).cpu().numpy() / norm
        betas.append((f * (along + acts[:, fires].toarray())).sum(0))
    found = np.full(sae.n_latents, math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        found[fires] = betas[0] / betas[1]
    return found


def _tuned(raw: dict[str, Any]) -> Tuned:
    read: dict[str, Any] = from_json(raw)
    for name in ("up", "down"):
        read[name] = tuple(LatentShift(**from_json(row, ["shift"])) for row in raw[name])
    read["dense"] = tuple(Separation(**from_json(row, ["auroc"])) for row in raw["dense"])
    read["by_delta"] = tuple((int(i), float(v)) for i, v in raw["by_delta"])
    return Tuned(**read)


def _text(one: Tuned) -> str:
    rows = [["", "latent", "shift", "in sd", "p max-T", "act base", "tuned", "encoded", "scaling", "", "delta"]]
    for sign, part in (("+", one.up), ("-", one.down)):
        rows += [
            [
                sign,
                str(r.latent),
                shown(r.shift, 2, "+"),
                f"{r.sds:+.1f}",
                f"{r.p_max_t:.3g}",
                f"{r.base_act:.2f}",
                f"{r.tuned_act:.2f}",
                f"{r.encoded:.2f}",
                "" if math.isnan(r.scaling) else f"{r.scaling:.2f}",
                r.kind,
                "" if math.isnan(r.delta) else f"{r.delta:+.3g}",
            ]
            for r in part
        ]
    dense = aligned([["tells it from the base", "AUROC", ""], *([d.name, shown(d.auroc), d.note] for d in one.dense)])
    head = f"{one.name}: {one.n_prompts} prompts, FVU {one.fvu:.3f}; {one.n_rose} latents rose, {one.n_fell} fell"
    return "\n".join([head, *aligned(rows), *dense, *_by_delta(one)])


def _by_delta(one: Tuned) -> list[str]:
    if not one.by_delta:
        return []
    return ["most for the bad answer, by attribution: " + ", ".join(f"{i} ({v:+.3g})" for i, v in one.by_delta[:5])]
