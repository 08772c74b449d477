"""A planted coupling is foretold; one that is not there is not, and pairs never see their own traits."""

import math

import numpy as np
import pytest

from sae_persona.errors import DataError
from sae_persona.studies.foretelling import (
    ALL,
    COLUMN,
    column_means,
    foretell,
    mantel,
    out_of_sample,
    spearman,
)

N = 8


def planted(seed=0, slope=0.5, noise=0.02):
    """A measure over pairs, and effects that follow it."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(N, N))
    return x, slope * x + noise * random.normal(size=(N, N)), random.normal(size=(N, N))


def test_a_planted_line_is_foretold_and_chance_is_not():
    x, effects, other = planted()
    found = {one.by: one for one in foretell(effects, {"x": x, "other": other}, permutations=199, resamples=200)}
    assert found["x"].r2.value > 0.98 and found["x"].p == 1 / 200 and found["x"].n == N * (N - 1)
    assert found["x"].spearman.low < found["x"].spearman.value < found["x"].spearman.high <= 1
    assert found["other"].r2.value < 0.1 and found["other"].p > 0.05
    assert found[ALL].r2.value > 0.9 > found[COLUMN].r2.value and math.isnan(found[COLUMN].p)
    assert found[f"{COLUMN} and {ALL}"].r2.value > 0.9


def test_columns_are_foretold_by_their_means():
    random = np.random.default_rng(1)
    effects = np.tile(random.normal(size=N), (N, 1)) + 0.01 * random.normal(size=(N, N))
    found = {one.by: one for one in foretell(effects, {"x": random.normal(size=(N, N))}, permutations=9, resamples=50)}
    assert found[COLUMN].r2.value > 0.98 > found["x"].r2.value
    assert found[f"{COLUMN} and {ALL}"].r2.value > 0.98


def test_a_pair_is_foretold_from_pairs_of_other_traits():
    x, effects, _ = planted(noise=0.3)
    before = out_of_sample(effects, [x])
    changed = effects.copy()
    changed[2, :], changed[:, 2], changed[5, :], changed[:, 5] = 9.0, -9.0, 7.0, -7.0
    after = out_of_sample(changed, [x])
    assert after[2, 5] == before[2, 5] and after[5, 2] == before[5, 2]
    assert after[0, 1] != before[0, 1] and np.isnan(np.diag(after)).all()
    both = [out_of_sample(e, [x], with_column=True) for e in (effects, changed)]
    changed_only_own = effects.copy()
    changed_only_own[2, 5] = 99.0
    assert out_of_sample(changed_only_own, [x], with_column=True)[2, 5] == both[0][2, 5]


def test_a_columns_mean_leaves_the_pair_out():
    effects = np.arange(N * N, dtype=float).reshape(N, N)
    assert column_means(effects)[0, 1] == pytest.approx(effects[2:, 1].mean())


def test_relabelling_keeps_the_pairs_of_a_trait_together():
    """Two matrices of random effects of traits: pairs are no independent draws, so a naive p is far too small."""
    ps = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        a, b = random.normal(size=N), random.normal(size=N)
        x, y = a[:, None] + a[None], b[:, None] + b[None]
        ps.append(mantel(x, y, permutations=99, seed=seed))
    assert np.mean(np.array(ps) <= 0.05) < 0.15 and np.mean(np.array(ps) <= 0.5) > 0.3
    assert math.isnan(mantel(np.ones((N, N)), y, permutations=9, seed=0))


def test_ranks():
    assert spearman(np.array([1.0, 2, 3]), np.array([1.0, 8, 27])) == pytest.approx(1)
    assert math.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_too_few_traits_and_unknown_pairs():
    with pytest.raises(DataError, match="over 6 traits or more, got 5"):
        foretell(np.zeros((5, 5)), {})
    x, effects, other = planted()
    effects[0, 1] = np.nan
    other[3, 4] = np.nan
    found = foretell(effects, {"x": x, "other": other}, permutations=9, resamples=20)
    assert [one.by for one in found] == ["x", COLUMN, f"{COLUMN} and {ALL}"] and found[0].n == N * (N - 1) - 1
    assert found[0].r2.value > 0.9
