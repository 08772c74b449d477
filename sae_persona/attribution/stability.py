"""Does a ranking belong to the model, or to one SAE? The same persona, ranked on SAEs of other seeds or widths.

Two SAEs share few latents (2501.16615: about 30 % over seeds) but may share the subspace that those span (2606.12138).
So the best latents are compared one by one, through the decoder direction nearest by cosine, and as a whole, through
principal angles between the spans of their directions. Both are set against random latents of the same SAEs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sae_persona.attribution.ranking import RankedLatent, Ranking
from sae_persona.attribution.tables import aligned, to_json
from sae_persona.errors import ConfigError, DataError, ModelError
from sae_persona.features.matching import Matching, match
from sae_persona.sae.model import SAE

LEVEL = 0.05
_ALIKE = ("pool", "by", "given", "within")
"""Settings of a ranking in which those compared may not differ."""

Survival = Literal["ranking", "subspace", "none", "untested"]
"""ranking: at least half of the best latents that tell the persona (p max-T up to 5 %) have a match that tells it in
the other SAE, too, with the same sign, and again on held-out examples. subspace: not that, but the spans overlap more
than 95 % of random ones do. none: neither. untested: none of the best latents tells the persona."""


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """How rankings of several SAEs are compared. ConfigError if a setting is out of its range."""

    top: int = 10
    """Best-ranked latents of each SAE that are compared."""
    cosine: float = 0.7
    """Cosine of two decoder directions from which on they count as matched."""
    draws: int = 500
    """Random sets of latents, of the same size, for the null."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if min(self.top, self.draws) < 1:
            raise ConfigError(f"top and draws are at least 1, got {self.top}, {self.draws}")
        if not 0 < self.cosine <= 1:
            raise ConfigError(f"cosine is above 0 and at most 1, got {self.cosine}")


@dataclass(frozen=True, kw_only=True)
class Match:
    """What became of one of the first SAE's best latents in the second."""

    latent: int
    rank: int
    z: float
    nearest: int
    cosine: float
    mutual: bool
    """Whether each is the other's nearest."""
    other_rank: int | None
    """Place of the nearest one in the second ranking; None if that does not keep it."""
    other_z: float | None
    survives: bool
    """Matched, and ranked with the same sign, p max-T and held-out p up to 5 %."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A ranking on one SAE, looked up in a ranking on another. Not the same the other way round."""

    a: str
    b: str
    matches: tuple[Match, ...]
    matched: float
    """Share of the best latents with a match."""
    matched_random: float
    """The same of all latents: what the two dictionaries share anyhow."""
    telling: int
    """How many of the best latents tell the persona: p max-T up to 5 %."""
    survives: float
    """Share of those that survive; NaN if there are none."""
    overlap_at_top: float
    """Share of the best latents whose match is among the second's best."""
    overlap_by_chance: float
    """What that would be if matches were ranked at random."""
    spearman: float
    """Of z over the pairs of best latent and match that both rankings keep; NaN for fewer than three."""
    angles: tuple[float, ...]
    """Principal angles between the two spans, in degrees, the smallest first."""
    subspace: float
    """Mean squared cosine of the principal angles: 1 for the same span, 0 for orthogonal ones."""
    subspace_random: float
    """Mean of the same over random sets of latents."""
    subspace_p: float
    """Share of random sets that overlap as much, (1 + #) / (1 + draws)."""
    survival: Survival


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Every ordered pair of SAEs."""

    persona: str
    top: int
    cosine: float
    comparisons: tuple[Comparison, ...]

    @property
    def survives(self) -> bool:
        """Whether the ranking survives in every comparison."""
        return all(one.survival == "ranking" for one in self.comparisons)

    def __str__(self) -> str:
        title = f"{self.persona}: the {self.top} best latents of each SAE, matched from a cosine of {self.cosine:g} on"
        cells = [["from -> to", "matched", "all latents", "survive", f"in top {self.top}", "chance", "rho of z"]]
        cells[0] += ["subspace", "random", "p", "smallest angle", "what survives"]
        for one in self.comparisons:
            rho = f"{one.spearman:+.2f}" if np.isfinite(one.spearman) else "-"
            line = [
                f"{one.a} -> {one.b}",
                f"{one.matched:.0%}",
                f"{one.matched_random:.0%}",
                f"{one.survives:.0%} of {one.telling}" if one.telling else "-",
            ]
            line += [f"{one.overlap_at_top:.0%}", f"{one.overlap_by_chance:.1%}", rho, f"{one.subspace:.2f}"]
            line += [f"{one.subspace_random:.2f}", f"{one.subspace_p:.3g}", f"{one.angles[0]:.0f} deg", one.survival]
            cells.append(line)
        return "\n".join([title, "", *aligned(cells)])

    def to_json(self) -> dict:
        """As JSON values; null stands for what is not a finite number."""
        return to_json(self)


def stability(
    saes: Sequence[SAE],
    rankings: Sequence[Ranking],
    config: StabilityConfig | None = None,
    *,
    names: Sequence[str] | None = None,
) -> Stability:
    """Compare the rankings of one persona on two or more SAEs of one hook point, each with each.

    DataError for fewer than two, rankings of several personas or made otherwise, or one that is not of its SAE;
    ModelError for SAEs of other widths or hook points; ConfigError for a ``top`` that a ranking, or the width of the
    activations, does not have room for.
    """
    config = config or StabilityConfig()
    names = list(names) if names is not None else [f"SAE {i}" for i in range(len(saes))]
    _check(saes, rankings, config, names)
    generator = np.random.default_rng(config.seed)
    order = [(i, j) for i in range(len(saes)) for j in range(len(saes)) if i != j]
    return Stability(
        persona=rankings[0].persona,
        top=config.top,
        cosine=config.cosine,
        comparisons=tuple(
            _compare((saes[i], rankings[i], names[i]), (saes[j], rankings[j], names[j]), config, generator)
            for i, j in order
        ),
    )


def _check(saes: Sequence[SAE], rankings: Sequence[Ranking], config: StabilityConfig, names: Sequence[str]) -> None:
    if len(saes) < 2 or not len(saes) == len(rankings) == len(names):
        raise DataError(
            f"two SAEs or more, each with a ranking and a name, got {len(saes)}, {len(rankings)} and {len(names)}"
        )
    if len(personas := {ranking.persona for ranking in rankings}) > 1:
        raise DataError(f"rankings of one persona are compared, got {', '.join(sorted(personas))}")
    settings = [{name: ranking.config.get(name) for name in _ALIKE} for ranking in rankings]
    if odd := next((i for i, one in enumerate(settings) if one != settings[0]), 0):
        name = next(name for name in _ALIKE if settings[odd][name] != settings[0][name])
        told = " and ".join(f"{settings[i][name]!r} in {names[i]}" for i in (0, odd))
        raise DataError(f"rankings made alike are compared, {name} is {told}: rank again")
    if len(places := {(sae.d_in, str(sae.metadata.get("hook"))) for sae in saes}) > 1:
        found = " and ".join(f"width {d} at {hook}" for d, hook in sorted(places))
        raise ModelError(f"SAEs of one hook point are compared, got {found}")
    for sae, ranking, name in zip(saes, rankings, names, strict=True):
        if len(ranking) < config.top:
            raise ConfigError(f"{name} ranks {len(ranking)} latents, fewer than top {config.top}: compare fewer")
        if max(row.latent for row in ranking) >= sae.n_latents:
            raise DataError(f"the ranking of {name} is of another SAE: this one has {sae.n_latents} latents")
        if config.top > min(sae.d_in, sae.n_latents):
            raise ConfigError(f"top {config.top} latents fill width {sae.d_in}: spans of fewer can be compared")


def _compare(
    a: tuple[SAE, Ranking, str], b: tuple[SAE, Ranking, str], config: StabilityConfig, generator: np.random.Generator
) -> Comparison:
    (sae_a, ranking_a, name_a), (sae_b, ranking_b, name_b) = a, b
    found, best = match(sae_a, sae_b), ranking_a[: config.top]
    matches = tuple(_match(row, place, found, ranking_b, config) for place, row in enumerate(best, start=1))
    within = [m.other_rank is not None and m.other_rank <= config.top and m.cosine >= config.cosine for m in matches]
    spans = [_spans(sae, [row.latent for row in ranking[: config.top]]) for sae, ranking, _ in (a, b)]
    angles, overlap = _angles(*spans)
    random = [_angles(*(_draw(sae, config.top, generator) for sae in (sae_a, sae_b)))[1] for _ in range(config.draws)]
    subspace_p = (1 + sum(one >= overlap for one in random)) / (1 + config.draws)
    tell = [m.survives for m, row in zip(matches, best, strict=True) if row.p_max_t <= LEVEL]
    survives = float(np.mean(tell)) if tell else float("nan")
    return Comparison(
        a=name_a,
        b=name_b,
        matches=matches,
        matched=float(np.mean([m.cosine >= config.cosine for m in matches])),
        matched_random=float((found.cosine_ab >= config.cosine).mean()),
        telling=len(tell),
        survives=survives,
        overlap_at_top=float(np.mean(within)),
        overlap_by_chance=config.top / sae_b.n_latents,
        spearman=_spearman([(m.z, m.other_z) for m in matches if m.other_z is not None]),
        angles=tuple(angles.tolist()),
        subspace=overlap,
        subspace_random=float(np.mean(random)),
        subspace_p=subspace_p,
        survival=_survival(survives, subspace_p),
    )


def _match(row: RankedLatent, rank: int, found: Matching, other: Ranking, config: StabilityConfig) -> Match:
    near, cosine = int(found.nearest_ab[row.latent]), float(found.cosine_ab[row.latent])
    place, its = next(((i, its) for i, its in enumerate(other, start=1) if its.latent == near), (None, None))
    tells = its is not None and its.direction == row.direction and max(its.p_max_t, its.held_out_p) <= LEVEL
    return Match(
        latent=row.latent,
        rank=rank,
        z=row.z,
        nearest=near,
        cosine=cosine,
        mutual=bool(found.mutual[row.latent]),
        other_rank=place,
        other_z=None if its is None else its.z,
        survives=cosine >= config.cosine and tells,
    )


def _survival(survives: float, subspace_p: float) -> Survival:
    if np.isnan(survives):
        return "untested"
    if survives >= 0.5:
        return "ranking"
    return "subspace" if subspace_p <= LEVEL else "none"


def _spans(sae: SAE, latents: Sequence[int]) -> np.ndarray:
    """Orthonormal columns that span the latents' decoder directions: [d_in, m] fp64."""
    return np.linalg.qr(sae.w_dec[list(latents)].double().cpu().numpy().T)[0]


def _draw(sae: SAE, n: int, generator: np.random.Generator) -> np.ndarray:
    return _spans(sae, generator.choice(sae.n_latents, n, replace=False).tolist())


def _angles(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float]:
    """Principal angles in degrees, the smallest first (Bjorck and Golub 1973), and their mean squared cosine."""
    from scipy.linalg import subspace_angles  # here: importing scipy.linalg costs a tenth of a second

    angles = subspace_angles(a, b)[::-1]
    return np.degrees(angles), float(np.mean(np.cos(angles) ** 2))


def _spearman(pairs: Sequence[tuple[float, float | None]]) -> float:
    from scipy.stats import spearmanr  # here: importing scipy.stats costs half a second

    x, y = np.array(pairs, float).reshape(-1, 2).T
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return float("nan")
    return float(spearmanr(x, y).statistic)  # pyright: ignore[reportAttributeAccessIssue]
