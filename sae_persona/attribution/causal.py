"""Does a latent that goes with a persona also make the model prefer the persona's answers?

A screen takes the best latents by association and by estimated effect, sets each of them in the model, and compares
what that does to contrast pairs with random latents that fire as often and as strongly at the same tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.attribution.ablation import Effects, exact_effects
from sae_persona.attribution.agreement import agreement
from sae_persona.attribution.association import Interval
from sae_persona.attribution.contrasts import Contrast, split_pairs
from sae_persona.attribution.metrics import Metric, Positions, Side, sides_of
from sae_persona.attribution.patching import Estimates, attribute
from sae_persona.attribution.ranking import RankedLatent, Ranking
from sae_persona.attribution.screens import LEVEL, Agreement, RandomEffects, Screen, ScreenedLatent, Verdict
from sae_persona.errors import ConfigError, DataError
from sae_persona.sae.model import SAE
from sae_persona.types import HookPoint

_NAN = float("nan")
MIN_QUESTIONS = 5
"""Fewest different questions that a verdict may rest on."""
MIN_CONTROLS = 19
"""Fewest random latents that can give a p of 5 %."""
_LIKE = 2.0
"""Factor within which the firing rate of a random latent is like a candidate's."""


@dataclass(frozen=True, kw_only=True)
class ScreenConfig:
    """How effects are estimated and measured. ConfigError if a setting is out of its range."""

    positions: Positions | None = None
    """Tokens at which latents are set: pre, answer or all. By default pre for a ranking of pool pre, else answer."""
    strength: float = 0.0
    """What latents are set to, in their own 99.9th percentile; 0 ablates."""
    metric: Metric = "sum"
    """Log-probabilities are summed over an answer, or averaged over its tokens."""
    screened: int = 20
    """Best-ranked latents whose effect is measured."""
    attributed: int = 10
    """Further latents whose effect is measured: those with the largest estimates on the train pairs."""
    controls: int = 100
    """Random latents, like those measured in firing rate and then in size; fewer than 19 can give no p of 5 %."""
    integration: int = 5
    """Points on the path of integrated gradients, a forward and a backward pass each; 0 leaves them out."""
    resamples: int = 1000
    """Bootstrap samples of latents, for how well estimates agree."""
    lm_batch: int = 32
    """Rows in one forward pass."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        if self.positions is not None and self.positions not in get_args(Positions):
            raise ConfigError(f"positions is one of {', '.join(get_args(Positions))}, got {self.positions!r}")
        if self.metric not in get_args(Metric):
            raise ConfigError(f"metric is one of {', '.join(get_args(Metric))}, got {self.metric!r}")
        if not 0 <= self.strength < float("inf"):
            raise ConfigError(f"strength is 0 or more, got {self.strength}")
        if min(self.screened, self.resamples, self.lm_batch) < 1 or min(self.attributed, self.controls) < 0:
            raise ConfigError(
                "screened, resamples and lm_batch are at least 1, attributed and controls at least 0, got "
                f"{self.screened}, {self.resamples}, {self.lm_batch}, {self.attributed}, {self.controls}"
            )
        if self.integration < 0:
            raise ConfigError(f"integration is 0 or more, got {self.integration}")


@dataclass(frozen=True, eq=False)
class _Measured:
    """What was run: each latent's column, and which are candidates and which controls."""

    config: ScreenConfig
    train: Estimates
    again: Estimates
    effects: Effects
    latents: list[int]
    candidates: list[int]
    controls: list[int]
    rate: Tensor
    """Share of the train pairs' edited tokens on which each latent of the SAE fires: [n_latents]."""
    questions: list[str]
    """Of each held-out pair."""


def screen(
    lm: LM,
    sae: SAE,
    ranking: Ranking,
    pairs: Sequence[Contrast],
    config: ScreenConfig | None = None,
    *,
    hook: HookPoint | None = None,
    units: Tensor | None = None,
    output_scores: Mapping[int, float] | None = None,
) -> Screen:
    """Screen the best latents of a ranking for an effect on contrast pairs.

    Candidates and controls are chosen, and effects estimated, on the train pairs; effects are measured on the held-out
    pairs. Pairs of one question are not independent, so an effect is the mean over questions of their means, and its
    interval Student's t over questions; p is Holm's over the candidates that were tested. Of fewer than MIN_QUESTIONS
    both are over pairs, which say nothing about other questions: there is no verdict then. Where no latent has an
    effect, t at 5 % rejects 5 % of 40,000 normal samples of 5 to 20 questions, 3.6 to 4.3 % of Student's with 3 degrees
    of freedom, but 11 to 8 % of exponential ones: an effect that few questions carry can pass
    (`experiments/2026-11-causal-screen/level.py`).

    Random latents are those nearest in firing rate and size; which they are depends on the candidates, and not on how
    many latents the ranking keeps. A candidate is compared with those that fire within half and twice as often as it
    does or, where they are fewer than MIN_CONTROLS, with all, and a warning. That p is of each candidate alone.

    hook           by default the hook point that the SAE was trained at
    units          [n_latents] each latent's 99.9th percentile (LatentStats.p999); needed where strength is not 0
    output_scores  latent -> score, to be shown beside

    ConfigError for more latents than the ranking has, or a strength without units; ModelError for an SAE of another
    width or hook point; DataError for a ranking of another SAE, too few pairs, answers that do not fit or a gradient
    that is not finite.
    """
    config = config or ScreenConfig()
    hook = hook or sae.hook
    lm.check(hook)
    sae.check_width(lm.d_model)
    sae.check_rebuilds()
    _check(sae, ranking, config, units)
    positions: Positions = config.positions or ("pre" if ranking.config["pool"] == "pre" else "answer")
    parts = split_pairs(pairs)
    train, held_out = (sides_of(lm, part, positions) for part in parts)
    targets = None if units is None or not config.strength else (config.strength * units.double().cpu()).nan_to_num()
    settings: dict[str, Any] = {"metric": config.metric, "batch": config.lm_batch}
    attributing = {"targets": targets, "integration": config.integration, **settings}
    estimates = attribute(lm, sae, hook, train, **attributing)
    candidates = _candidates(ranking, estimates, config)
    size = estimates.size if targets is None else targets * sae.w_dec.norm(dim=1).double().cpu()
    controls = _controls(ranking[: config.screened], estimates.rate, size, candidates, config.controls)
    latents = list(dict.fromkeys([*candidates, *controls]))
    measured = _Measured(
        config=config,
        train=estimates,
        again=attribute(lm, sae, hook, held_out, **attributing),
        effects=_effects(lm, sae, hook, held_out, latents, targets, settings),
        latents=latents,
        candidates=candidates,
        controls=controls,
        rate=estimates.rate,
        questions=[pair.question for pair in parts[1]],
    )
    return _screen(ranking, measured, positions, len(parts[0]), output_scores or {})


def _check(sae: SAE, ranking: Ranking, config: ScreenConfig, units: Tensor | None) -> None:
    if not len(ranking):
        raise DataError(f"the ranking for {ranking.persona} is empty: rank first")
    if config.screened > len(ranking):
        raise ConfigError(
            f"screened {config.screened} is more than the {len(ranking)} latents that the ranking for "
            f"{ranking.persona} keeps: screen fewer, or rank with a larger --top"
        )
    if (last := max(row.latent for row in ranking)) >= sae.n_latents:
        raise DataError(
            f"the ranking names latent {last}, this SAE has latents 0 to {sae.n_latents - 1}: it is of another SAE"
        )
    if config.strength and units is None:
        raise ConfigError("a strength is counted in each latent's 99.9th percentile: give units, LatentStats.p999")
    if units is not None and len(units) != sae.n_latents:
        raise DataError(f"units are needed for {sae.n_latents} latents, got {len(units)}: measure this SAE")


def _effects(
    lm: LM,
    sae: SAE,
    hook: HookPoint,
    sides: list[Side],
    latents: list[int],
    targets: Tensor | None,
    settings: dict[str, Any],
) -> Effects:
    chosen = torch.tensor(latents)
    goal = None if targets is None else targets[chosen]
    return exact_effects(lm, sae, hook, sides, chosen, targets=goal, **settings)


def _candidates(ranking: Ranking, estimates: Estimates, config: ScreenConfig) -> list[int]:
    """The best by association, then the best by estimate that are not among those."""
    ranked = [row.latent for row in ranking[: config.screened]]
    order = estimates.effect.abs().argsort(descending=True, stable=True).tolist()
    more = [i for i in order if i not in set(ranked) and estimates.effect[i] != 0]
    return [*ranked, *more[: config.attributed]]


def _controls(screened: Sequence[RankedLatent], rate: Tensor, size: Tensor, candidates: list[int], n: int) -> list[int]:
    """Latents near the candidates, taken in turns, one for each: like ones in firing rate first, and of those, and of
    the others, the nearest in the logarithms of firing rate and edit's size.

    Only those are no controls that are screened and that the ranking says tell the persona. Candidates that it does not
    name may be: without the largest estimates among the controls, any effect would look large.
    """
    fires = ((rate > 0) & (size > 0)).numpy()
    free = np.setdiff1d(np.flatnonzero(fires), [row.latent for row in screened if row.p_max_t <= LEVEL])
    with np.errstate(divide="ignore"):
        at = np.log(np.stack([rate.numpy(), size.numpy()], axis=1))
    queues = []
    for candidate in (candidate for candidate in candidates if fires[candidate]):
        distance = ((at[free] - at[candidate]) ** 2).sum(1)
        order = np.lexsort((distance, ~_like(rate.numpy()[free], float(rate[candidate]))))
        queues.append(free[order[:n]].tolist())
    picked = dict.fromkeys(latent for turn in zip(*queues, strict=True) for latent in turn)
    return list(picked)[:n]


def _like(rates: np.ndarray, rate: float) -> np.ndarray:
    """Which of the firing rates lie within the factor of one: bool."""
    return (rates >= rate / _LIKE) & (rates <= rate * _LIKE)


def _screen(
    ranking: Ranking, found: _Measured, positions: Positions, n_train: int, output_scores: Mapping[int, float]
) -> Screen:
    names, question = np.unique(found.questions, return_inverse=True)
    few = len(names) < MIN_QUESTIONS
    unit = np.arange(len(question)) if few else question.ravel()
    effects, p = over_units(found.effects.change.numpy(), unit)
    base, _ = over_units(found.effects.base.numpy()[:, None], unit)
    random = effects.value[[found.latents.index(latent) for latent in found.controls]]
    sizes = np.abs(random)
    rows = _rows(ranking, found, effects, p, sizes, few, output_scores)
    return Screen(
        persona=ranking.persona,
        config=asdict(found.config) | {"positions": positions},
        n_train=n_train,
        n_held_out=len(question),
        n_questions=len(names),
        over="pairs" if few else "questions",
        base=base.at(0),
        rows=rows,
        random=RandomEffects(
            latents=tuple(found.controls),
            effects=tuple(random.tolist()),
            rates=tuple(found.rate[found.controls].tolist()),
            mean=float(sizes.mean()) if len(sizes) else _NAN,
            p95=float(np.quantile(sizes, 0.95)) if len(sizes) else _NAN,
        ),
        agreement=_agreements(found, effects.value, np.random.default_rng(found.config.seed)),
    )


def over_units(values: np.ndarray, unit: np.ndarray) -> tuple[Interval, np.ndarray]:
    """Means over units of their means of values [n_pairs, m], t's 95 % intervals and two-sided p: [m] each.

    unit    [n_pairs] which question, or pair, each belongs to
    """
    means = np.zeros((unit.max() + 1, values.shape[1]))
    np.add.at(means, unit, values)
    means /= np.bincount(unit)[:, None]
    n, mean = len(means), means.mean(axis=0)
    error = means.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.full_like(mean, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0, np.abs(mean) / error)
    half_width = stdtrit(max(n - 1, 1), 0.975) * error
    return Interval(mean, mean - half_width, mean + half_width), 2 * stdtr(max(n - 1, 1), -t)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values (1979): [m]."""
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def _rows(
    ranking: Ranking, found: _Measured, effects: Interval, p: np.ndarray, sizes: np.ndarray, few: bool,
    output_scores: Mapping[int, float],
) -> tuple[ScreenedLatent, ...]:  # fmt: skip
    """Rows for the candidates; ``sizes`` are those of the controls' effects."""
    places = {row.latent: place for place, row in enumerate(ranking, start=1)}
    estimated = found.train.effect.abs()
    fires = found.effects.touched.double().mean(0).tolist()
    tested = [column for column in range(len(found.candidates)) if fires[column]]
    p_effect = dict(zip(tested, holm(p[tested]).tolist(), strict=True))
    rows = []
    for column, latent in enumerate(found.candidates):
        told = ranking[places[latent] - 1] if latent in places else None
        effect = effects.at(column)
        rate, random_rate, others, like = _compared(found, latent, sizes)
        p_random = (1 + int((others >= abs(effect.value)).sum())) / (1 + len(others))
        direction = told.direction if told else 0
        expected = direction if found.config.strength else -direction
        p_holm = p_effect.get(column, 1.0)
        holds = fires[column] and not few
        rows.append(
            ScreenedLatent(
                latent=latent,
                rank=places.get(latent),
                direction=direction,
                p_max_t=told.p_max_t if told else _NAN,
                held_out_auroc=told.held_out_auroc if told else Interval(_NAN, _NAN, _NAN),
                held_out_p=told.held_out_p if told else _NAN,
                estimate=float(found.train.effect[latent]),
                estimate_rank=int((estimated > estimated[latent]).sum()) + 1,
                integrated=_NAN if found.train.integrated is None else float(found.train.integrated[latent]),
                delta=float(found.train.delta[latent]),
                fires=fires[column],
                effect=effect,
                p_effect=p_holm,
                rate=rate,
                random_rate=random_rate,
                n_random=len(others),
                like=like,
                p_random=p_random,
                output_score=output_scores.get(latent),
                verdict=verdict(told, effect.value, p_holm, expected, p_random, len(others))
                if holds
                else ("few questions" if fires[column] else "silent"),
            )
        )
    return tuple(rows)


def _compared(found: _Measured, latent: int, sizes: np.ndarray) -> tuple[float, float, np.ndarray, bool]:
    """A candidate's firing rate, the median one of the random latents it is compared with, the sizes of their effects,
    and whether they fire like it."""
    rate, rates = float(found.rate[latent]), found.rate[found.controls].numpy()
    other = np.array(found.controls, int) != latent
    near = other & _like(rates, rate)
    like = bool(near.sum() >= MIN_CONTROLS)
    chosen = near if like else other
    return rate, float(np.median(rates[chosen])) if chosen.any() else _NAN, sizes[chosen], like


def verdict(
    told: RankedLatent | None, effect: float, p_effect: float, expected: int, p_random: float, n_random: int
) -> Verdict:
    """What a latent's place in the ranking and its effect add up to; ``expected`` is the sign the ranking predicts."""
    if 1 / (1 + n_random) > LEVEL:
        return "underpowered"
    holds = told is not None and max(told.p_max_t, told.held_out_p) <= LEVEL
    if max(p_effect, p_random) > LEVEL:
        return "associated only" if holds else "no"
    if not holds:
        return "effect only"
    return "causal" if effect * expected > 0 else "opposite"


def _agreements(found: _Measured, exact: np.ndarray, generator: np.random.Generator) -> tuple[Agreement, ...]:
    turned = 1.0 if found.config.strength else -1.0
    agreements = []
    for split, estimates in (("train", found.train), ("held_out", found.again)):
        named = {"gradient": estimates.effect, "integrated": estimates.integrated, "delta": turned * estimates.delta}
        for name, values in named.items():
            if values is not None:
                x = values.numpy()[found.latents]
                agreements.append(agreement(name, split, x, exact, found.config.resamples, generator))
    return tuple(agreements)
