"""Rank all latents by how well they tell a persona, test the order, and repeat it on held-out examples."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from sae_persona.attribution.association import Association, Interval, associate, aurocs
from sae_persona.attribution.baselines import dense_baselines, random_directions, random_latents
from sae_persona.attribution.consistency import Consistency, consistency
from sae_persona.attribution.hard_negatives import FEWEST_HARD, hard_negatives
from sae_persona.attribution.labels import WITHIN, Within
from sae_persona.attribution.midranks import SortedColumns
from sae_persona.attribution.null import Null, permutation_null
from sae_persona.attribution.partial import Covariates
from sae_persona.attribution.ranking import RankedLatent, Ranking
from sae_persona.attribution.splits import Labelled, SplitExamples, controls, room_in_both
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.pooled import POOLS, Pool, Pooled
from sae_persona.features.stats import LatentStats

By = Literal["rank", "activation"]

_PLACES = 6
"""Statistics are ordered by as many decimals: the last bits of a sum depend on how many personas are ranked beside it,
and latents that are tied must not change places for them."""


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """How a ranking is made. ConfigError if a setting is out of its range."""

    pool: Pool = "pre"
    """What an example's activation is: at the token before the answer, or the max or mean over the answer."""
    by: By = "rank"
    """What goes with the label: a latent's midranks (rank sums, the order of AUROC), or its activations (correlation
    within blocks)."""
    given: tuple[str, ...] = ()
    """Covariates to control for: the ranking is then by the partial correlation given them."""
    within: tuple[Within, ...] = ("template", "domain")
    """Labels are permuted among examples that share these; "": among all."""
    permutations: int = 1000
    """Permutations; no p falls below 1 / (permutations + 1)."""
    min_rate: float = 0.005
    """Share of train examples on which a latent must fire to be tested. Looks at no label, so it costs no validity."""
    top: int = 50
    """Rows that the ranking keeps."""
    matched: int = 100
    """Random latents, the nearest in firing rate to the best one."""
    probe_c: float | None = None
    """Inverse L2 penalty of the logistic probe, on standardised inputs (scikit-learn's C); by default cross-validated
    on the train split, whole templates left out."""
    min_confidence: float = 0.0
    """Examples whose label is less certain are left out; from 0 to 1."""
    force: bool = False
    """Rank with fewer than ten examples of a class, too, and say so in the table."""
    seed: int = 0
    """Seed of the permutations."""

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ConfigError(f"pool is one of {', '.join(POOLS)}, got {self.pool!r}")
        if self.by not in ("rank", "activation"):
            raise ConfigError(f"by is rank or activation, got {self.by!r}")
        if unknown := set(self.within) - set(WITHIN):
            raise ConfigError(
                f'within takes {", ".join(WITHIN)}, or "" for none of them, got {", ".join(sorted(unknown))}'
            )
        if min(self.permutations, self.top, self.matched) < 1:
            raise ConfigError(
                f"permutations, top and matched are at least 1, got {self.permutations}, {self.top}, {self.matched}"
            )
        if not 0 <= self.min_rate <= 1:
            raise ConfigError(f"min_rate lies between 0 and 1, got {self.min_rate}")
        if not 0 <= self.min_confidence <= 1:
            raise ConfigError(f"min_confidence lies between 0 and 1, got {self.min_confidence}")
        if self.probe_c is not None and not self.probe_c > 0:
            raise ConfigError(f"probe_c is above 0, got {self.probe_c}")


def rank(
    pooled: Pooled,
    stats: LatentStats,
    persona: str,
    config: RankConfig | None = None,
    *,
    covariates: Covariates | None = None,
    device: str | torch.device = "cpu",
) -> Ranking:
    """Rank the latents of ``pooled`` for a persona: ``rank_all`` of one."""
    return rank_all(pooled, stats, (persona,), config, covariates=covariates, device=device)[persona]


def rank_all(
    pooled: Pooled,
    stats: LatentStats,
    personas: Sequence[str],
    config: RankConfig | None = None,
    *,
    covariates: Covariates | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Ranking]:
    """Rank the latents of ``pooled`` for each persona, on one device.

    covariates   of all examples, from which ``config.given`` picks

    Ranks by the size of the standardised statistic on the train split; the held-out split decides nothing, it only
    repeats, in the direction found on train. Latents are sorted once; personas that are labelled on the same examples,
    in the same blocks, given the same, are tested in one pass under the same permutations, others in passes of their
    own. Each gets the ranking that it would get alone.

    Numeric covariates are controlled for as linear splines (`splines.py`), or straight lines where there are too few
    examples for a bend; `partial.py` says what of a confound is left.

    DataError as in ``select``, for a persona named twice, if no latent fires often enough, for covariates that are
    missing at an example, or that explain a label wholly; ConfigError for one that there is not. Before any result.
    """
    config = config or RankConfig()
    if twice := [name for i, name in enumerate(personas) if name in personas[:i]]:
        raise DataError(f"{twice[0]!r} is named twice: name each persona once")
    if not personas:
        raise DataError(f"no persona to rank: the labels are {', '.join(pooled.personas) or 'none'}")
    groups: dict[tuple[object, ...], tuple[Covariates | None, list[Labelled]]] = {}
    for persona in personas:
        known = _known(pooled, covariates, config, persona)
        labelled = Labelled.of(pooled, persona, config.within, min_confidence=config.min_confidence, force=config.force)
        alike = (*labelled.examples, known.names if known else ())
        groups.setdefault(alike, (known, []))[1].append(labelled)
    columns = SortedColumns.of(pooled.pools[config.pool], device)
    found: dict[str, Ranking] = {}
    for known, group in groups.values():
        found |= {one.persona: one for one in _Group(pooled, stats, columns, known, group, config).rankings()}
    return {persona: found[persona] for persona in personas}


def _known(pooled: Pooled, covariates: Covariates | None, config: RankConfig, persona: str) -> Covariates | None:
    """The covariates that are controlled for, if any."""
    if not config.given:
        return None
    if covariates is None:
        raise ConfigError(f"given {', '.join(config.given)}, but no covariates came with the examples")
    if len(covariates.values) != len(pooled):
        raise DataError(f"covariates are of {len(covariates.values)} examples, there are {len(pooled)}")
    return covariates.named(config.given, persona)


class _Group:
    """Personas that are labelled on the same examples, in the same blocks, and are given the same covariates."""

    def __init__(
        self, pooled: Pooled, stats: LatentStats, columns: SortedColumns, known: Covariates | None,
        labelled: Sequence[Labelled], config: RankConfig,
    ) -> None:  # fmt: skip
        self.pooled, self.stats, self.config, self.labelled = pooled, stats, config, labelled
        over = columns.rows(labelled[0].train.rows)
        self.rates = over.counts.cpu().numpy() / over.m
        self.tested = np.flatnonzero((self.rates > 0) & (self.rates >= config.min_rate))
        if not len(self.tested):
            raise DataError(
                f"no latent fires on {config.min_rate:.1%} of the {over.m} train examples ({config.pool!r}): "
                f"lower min_rate or choose another pool"
            )
        columns = columns.latents(self.tested)
        n_knots = 0 if known is None else room_in_both(labelled[0], known)
        self.train, self.held_out = (
            SplitExamples.of(split, columns, labelled, known, n_knots, config.by == "activation")
            for split in ("train", "held_out")
        )
        self.controls = () if known is None else controls(known, labelled[0].train, n_knots)
        self.settings: dict[str, Any] = {"permutations": config.permutations, "seed": config.seed}

    def rankings(self) -> Iterator[Ranking]:
        """One for each persona."""
        train = self.train
        nulls = permutation_null(train.columns, train.statistics(train.columns), train.blocks, **self.settings)
        alone = [null.z for null in nulls]
        if self.config.given:
            alone = [statistic.z.cpu().numpy() for statistic in train.alone(train.columns)]
        again = aurocs(self.held_out.columns, self.held_out.labels()).cpu().numpy()
        for i in range(len(self.labelled)):
            yield self._ranking(i, nulls[i], alone[i], again[:, i])

    def _ranking(self, i: int, null: Null, alone: np.ndarray, held_out_auroc: np.ndarray) -> Ranking:
        config, labelled = self.config, self.labelled[i]
        direction = np.where(null.z < 0, -1.0, 1.0)
        order = np.argsort(-np.abs(null.z).round(_PLACES), kind="stable")
        oriented = np.where(direction > 0, held_out_auroc, 1 - held_out_auroc)
        dense = self.pooled.dense["pre" if config.pool == "pre" else "mean"]
        train, held_out = labelled.train, labelled.held_out
        return Ranking(
            persona=labelled.persona,
            config=asdict(config) | {"within": list(config.within), "given": list(config.given)},
            n_train=labelled.train.counts,
            n_held_out=labelled.held_out.counts,
            n_blocks=labelled.train.n_blocks,
            n_tested=len(self.tested),
            rows=self._rows(i, order[: config.top], null, alone, direction),
            dense=dense_baselines(
                dense, train, held_out, probe_c=config.probe_c, groups=self._templates(train.rows), **self.settings
            ),
            random=random_latents(self.rates[self.tested], oriented, int(order[0]), config.matched),
            random_directions=random_directions(dense, train, held_out, seed=config.seed),
            hard=self._against_hard_negatives(i, order[: config.top]),
            warnings=tuple(one.warning for one in (train, held_out) if one.warning),
            controls=self.controls,
        )

    def _templates(self, rows: np.ndarray) -> np.ndarray:
        """What cross-validation leaves out whole, a number an example."""
        return np.unique(self.pooled.template[rows], return_inverse=True)[1]

    def _against_hard_negatives(self, i: int, top: np.ndarray) -> dict[int, Interval]:
        """Held-out AUROC of the top latents against the hard negatives alone; of none where there are none."""
        held_out = self.labelled[i].held_out
        if (self.pooled.hard[held_out.rows] & ~held_out.y).sum() < FEWEST_HARD:
            return {}
        latents = self.tested[top]
        found = hard_negatives(self.pooled.pools[self.config.pool][:, latents], self.pooled, held_out)
        return {int(latent): found.hard.at(place) for place, latent in enumerate(latents)}

    def _rows(
        self, i: int, top: np.ndarray, null: Null, alone: np.ndarray, direction: np.ndarray
    ) -> tuple[RankedLatent, ...]:
        """Rows for the latents ``top``, which index the tested ones."""
        few = np.sort(top)
        first, second = self.train.columns.latents(few), self.held_out.columns.latents(few)
        (repeated,) = permutation_null(
            second,
            self.held_out.statistics(second, i),
            self.held_out.blocks,
            direction=direction[few],
            **self.settings,
        )
        labelled = self.labelled[i]
        templates = self.pooled.template[labelled.train.rows]
        same = consistency(first, labelled.train.y, templates, direction[few])
        found = associate(first, labelled.train.y), associate(second, labelled.held_out.y)
        partials = self.train.partial(first, i), self.held_out.partial(second, i)
        return tuple(
            self._row(int(j), int(np.searchsorted(few, j)), null, alone, repeated, found, partials, same) for j in top
        )

    def _row(
        self, j: int, place: int, null: Null, alone: np.ndarray, repeated: Null,
        found: tuple[Association, Association], partials: tuple[Interval, Interval], same: Consistency,
    ) -> RankedLatent:  # fmt: skip
        """The row of tested latent ``j``; what is of the top latents only has it at ``place``."""
        train, held_out = found
        latent = int(self.tested[j])
        return RankedLatent(
            latent=latent,
            z=float(null.z[j]),
            p_max_t=float(null.p_max_t[j]),
            q_bh=float(null.q_bh[j]),
            auroc=train.auroc.at(place),
            r=train.r.at(place),
            difference=train.difference.at(place),
            d=train.d.at(place),
            held_out_z=float(repeated.z[place]),
            held_out_auroc=held_out.auroc.at(place),
            held_out_p=float(repeated.p[place]),
            firing_rate=float(self.stats.firing_rate[latent]),
            p999=float(self.stats.p999[latent]),
            unadjusted_z=float(alone[j]),
            partial=partials[0].at(place),
            held_out_partial=partials[1].at(place),
            n_templates=same.n,
            agreement=float(same.agreement[place]),
            template_low=float(same.low[place]),
            template_high=float(same.high[place]),
        )
