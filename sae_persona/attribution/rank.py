"""Rank all latents by how well they tell a persona, test the order, and repeat it on held-out examples."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sae_persona.attribution.association import Association, associate
from sae_persona.attribution.baselines import dense_baselines, random_latents
from sae_persona.attribution.labels import Within, select
from sae_persona.attribution.midranks import SortedColumns
from sae_persona.attribution.null import Null, permutation_test
from sae_persona.attribution.ranking import RankedLatent, Ranking
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.pooled import POOLS, Pool, Pooled
from sae_persona.features.stats import LatentStats


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """How a ranking is made. ConfigError if a setting is out of its range."""

    pool: Pool = "pre"
    """What an example's activation is: at the token before the answer, or the max or mean over the answer."""
    within: tuple[Within, ...] = ("template", "domain")
    """Labels are permuted among examples that share these; none: among all."""
    permutations: int = 1000
    """Permutations; no p falls below 1 / (permutations + 1)."""
    min_rate: float = 0.005
    """Share of train examples on which a latent must fire to be tested. Looks at no label, so it costs no validity."""
    top: int = 50
    """Rows that the ranking keeps."""
    matched: int = 100
    """Random latents, the nearest in firing rate to the best one."""
    probe_c: float = 0.1
    """Inverse L2 penalty of the logistic probe, on standardised inputs (scikit-learn's C)."""
    seed: int = 0
    """Seed of the permutations."""

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ConfigError(f"pool is one of {', '.join(POOLS)}, got {self.pool!r}")
        if unknown := set(self.within) - {"template", "domain", "author"}:
            raise ConfigError(f"within takes template, domain and author, got {', '.join(sorted(unknown))}")
        if min(self.permutations, self.top, self.matched) < 1:
            raise ConfigError(
                f"permutations, top and matched are at least 1, got {self.permutations}, {self.top}, {self.matched}"
            )
        if not 0 <= self.min_rate <= 1:
            raise ConfigError(f"min_rate lies between 0 and 1, got {self.min_rate}")
        if not self.probe_c > 0:
            raise ConfigError(f"probe_c is above 0, got {self.probe_c}")


def rank(pooled: Pooled, stats: LatentStats, persona: str, config: RankConfig | None = None) -> Ranking:
    """Rank the latents of ``pooled`` for a persona.

    Ranks by the size of the standardised rank sum on the train split; the held-out split decides nothing, it only
    repeats, in the direction found on train. DataError as in ``select``, and if no latent fires often enough.
    """
    config = config or RankConfig()
    train = select(pooled, persona, "train", within=config.within)
    held_out = select(pooled, persona, "held_out", within=config.within)
    values = pooled.pools[config.pool]
    rates = values[train.rows].getnnz(axis=0) / len(train.rows)
    tested = np.flatnonzero((rates > 0) & (rates >= config.min_rate))
    if not len(tested):
        raise DataError(
            f"no latent fires on {config.min_rate:.1%} of the {len(train.rows)} train examples ({config.pool!r}): "
            f"lower min_rate or choose another pool"
        )
    columns = SortedColumns.of(values[train.rows][:, tested])
    repeated = SortedColumns.of(values[held_out.rows][:, tested])
    found, again = associate(columns, train.y), associate(repeated, held_out.y)
    settings: dict[str, Any] = {"permutations": config.permutations, "seed": config.seed}
    null = permutation_test(columns.matrix, train.y, train.blocks, **settings)
    direction = np.where(null.z < 0, -1.0, 1.0)
    order = np.argsort(-np.abs(null.z), kind="stable")
    top = order[: config.top]
    null_again = permutation_test(
        repeated.matrix[top], held_out.y, held_out.blocks, direction=direction[top], **settings
    )
    oriented = np.where(direction > 0, again.auroc.value, 1 - again.auroc.value)
    return Ranking(
        persona=persona,
        config=asdict(config) | {"within": list(config.within)},
        n_train=train.counts,
        n_held_out=held_out.counts,
        n_blocks=train.n_blocks,
        n_tested=len(tested),
        rows=_rows(top, tested, stats, (found, null), (again, null_again)),
        dense=dense_baselines(
            pooled.dense["pre" if config.pool == "pre" else "mean"], train, held_out, probe_c=config.probe_c, **settings
        ),
        random=random_latents(rates[tested], oriented, int(order[0]), config.matched),
    )


def _rows(
    top: np.ndarray,
    tested: np.ndarray,
    stats: LatentStats,
    train: tuple[Association, Null],
    held_out: tuple[Association, Null],
) -> tuple[RankedLatent, ...]:
    """Rows for the latents ``top``, which index ``tested``; the held-out null holds ``top`` only."""
    (found, null), (again, null_again) = train, held_out
    firing_rate, p999 = stats.firing_rate.tolist(), stats.p999.tolist()
    return tuple(
        RankedLatent(
            latent=int(tested[i]),
            z=float(null.z[i]),
            p_max_t=float(null.p_max_t[i]),
            q_bh=float(null.q_bh[i]),
            auroc=found.auroc.at(i),
            r=found.r.at(i),
            difference=found.difference.at(i),
            d=found.d.at(i),
            held_out_z=float(null_again.z[place]),
            held_out_auroc=again.auroc.at(i),
            held_out_p=float(null_again.p[place]),
            firing_rate=firing_rate[tested[i]],
            p999=p999[tested[i]],
        )
        for place, i in enumerate(top)
    )
