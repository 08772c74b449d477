"""Partial association against regression written out, the confound it is there for, and covariates that cannot be."""

import numpy as np
import pytest
import torch
from scipy import sparse, stats

from sae_persona.attribution.midranks import SortedColumns
from sae_persona.attribution.null import permutation_null, permuted
from sae_persona.attribution.partial import Covariates, Residuals, partial_correlation, partial_statistics
from sae_persona.attribution.splines import splines
from sae_persona.errors import ConfigError, DataError


def example(seed, *, m=80, n_latents=6, n_blocks=4):
    generator = np.random.default_rng(seed)
    values = generator.integers(1, 6, (m, n_latents)) * (generator.random((m, n_latents)) < 0.4)
    covariates = generator.normal(size=(m, 2)) + values[:, :1]
    y = generator.random(m) < 0.3 + 0.3 * (values[:, 0] > 0)
    return values, covariates, y, np.sort(generator.integers(0, n_blocks, m))


def regressed(x, covariates, blocks):
    """What numpy's least squares leaves of the columns of x."""
    design = np.column_stack([np.eye(blocks.max() + 1)[blocks], covariates])
    return x - design @ np.linalg.lstsq(design, x, rcond=None)[0]


def null_of(values, y, blocks, covariates, *, by="rank", n=199, seed=0, device="cpu"):
    columns = SortedColumns.of(sparse.csr_matrix(np.asarray(values, float)), device)
    labels = torch.from_numpy(y).to(device)[:, None]
    value = columns.doubled if by == "rank" else columns.value
    statistics = partial_statistics(columns, value, labels, ("x",), Residuals(covariates, blocks, device))
    return permutation_null(columns, statistics, blocks, permutations=n, seed=seed)[0]


@pytest.mark.parametrize("by", ["rank", "activation"])
def test_is_the_correlation_of_what_regression_leaves(by):
    values, covariates, y, blocks = example(0)
    columns = SortedColumns.of(sparse.csr_matrix(values.astype(float)))
    value = columns.doubled if by == "rank" else columns.value
    got = partial_correlation(columns, value, y, "x", Residuals(covariates, blocks))
    f = stats.rankdata(values, axis=0) if by == "rank" else values
    left_y = regressed(y.astype(float), covariates, blocks)
    for i, left_f in enumerate(regressed(f.astype(float), covariates, blocks).T):
        assert got.value[i] == pytest.approx(stats.pearsonr(left_f, left_y).statistic, abs=1e-10)
        half = 1.959964 / np.sqrt(80 - 4 - 2 - 2)
        assert got.low[i] == pytest.approx(np.tanh(np.arctanh(got.value[i]) - half), abs=1e-6)
        assert got.high[i] == pytest.approx(np.tanh(np.arctanh(got.value[i]) + half), abs=1e-6)


def test_without_covariates_in_one_block_it_is_pearsons_with_scipys_interval():
    values, _, y, _ = example(1)
    columns = SortedColumns.of(sparse.csr_matrix(values.astype(float)))
    got = partial_correlation(columns, columns.value, y, "x", Residuals(np.zeros((80, 0)), np.zeros(80, int)))
    for i, column in enumerate(values.T):
        wanted = stats.pearsonr(column, y)
        assert got.value[i] == pytest.approx(wanted.statistic, abs=1e-12)
        assert (got.low[i], got.high[i]) == pytest.approx(tuple(wanted.confidence_interval()), abs=1e-9)


def test_p_counts_freedman_and_lanes_permutations_in_units_of_the_labels_spread():
    values, covariates, y, blocks = example(2)
    ranks = stats.rankdata(values, axis=0)
    left_f, e = (regressed(x.astype(float), covariates, blocks) for x in (ranks, y))
    source = np.concatenate([part.numpy() for part in permuted(blocks, 99, seed=5)])
    probability = np.clip(y - e, 0.02, 0.98)
    spread = np.sqrt(probability * (1 - probability))
    under = np.stack([regressed(spread * (e / spread)[one], covariates, blocks) for one in source], axis=1)

    def r(labels):
        return left_f.T @ labels / np.linalg.norm(left_f, axis=0)[:, None] / np.linalg.norm(labels, axis=0)

    null, seen = abs(r(under)), abs(r(e[:, None]))
    got = null_of(values, y, blocks, covariates, n=99, seed=5)
    np.testing.assert_allclose(got.z, r(e[:, None])[:, 0] * np.sqrt(80 - 4 - 2), atol=1e-9)
    np.testing.assert_allclose(got.p, (1 + (null >= seen).sum(1)) / 100)
    np.testing.assert_allclose(got.p_max_t, (1 + (null.max(0) >= seen).sum(1)) / 100)


def test_without_covariates_labels_themselves_are_permuted():
    """So that the test is exact: every block's residuals are its labels minus their mean."""
    values, covariates, y, blocks = example(6)
    columns = SortedColumns.of(sparse.csr_matrix(values.astype(float)))
    labels = torch.from_numpy(y)[:, None]
    (found,) = partial_statistics(columns, columns.doubled, labels, ("x",), Residuals(covariates[:, :0], blocks))
    (source,) = permuted(blocks, 20, seed=0)
    wanted = regressed(y[source.numpy()].T.astype(float), covariates[:, :0], blocks)
    np.testing.assert_allclose(found.labels(source), wanted / np.linalg.norm(wanted, axis=0), atol=1e-6)


def confounded(seed, m=300):
    """Latent 0 tracks length and nothing else, latent 1 the label; long answers carry the label more often."""
    generator = np.random.default_rng(seed)
    length = generator.integers(5, 60, m).astype(float)
    y = generator.random(m) < np.where(length > 30, 0.8, 0.2)
    values = generator.exponential(size=(m, 12)) * (generator.random((m, 12)) < 0.4)
    values[:, 0] = np.maximum(0, length - 20 + generator.normal(0, 5, m))
    values[:, 1] = (y & (generator.random(m) < 0.7)) * generator.exponential(size=m)
    return values, y, length[:, None]


@pytest.mark.parametrize("by", ["rank", "activation"])
def test_a_planted_confound_ranks_high_and_vanishes_given_it(by):
    gone = 0
    for seed in range(5):
        values, y, length = confounded(seed)
        blocks = np.zeros(len(y), int)
        alone, given = (null_of(values, y, blocks, x, by=by, seed=seed) for x in (length[:, :0], length))
        assert abs(alone.z[0]) > 6 and alone.p_max_t[0] == 1 / 200
        assert alone.p_max_t[1] == given.p_max_t[1] == 1 / 200, "what tells the label stays"
        assert abs(given.z[0]) < 4
        gone += given.p_max_t[0] > 0.05
    assert gone >= 4


def bent(seed, m=200, n_latents=60):
    """Latents that bend with a covariate that all but says the label, and have nothing else to do with it."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(m, 1))
    y = generator.random(m) < 1 / (1 + np.exp(-4 * (abs(x[:, 0]) - 0.7)))
    slopes, kinks = generator.choice([-3, 3], n_latents), generator.uniform(-1.5, 1.5, n_latents)
    return np.maximum(0, slopes * (x - kinks) + generator.normal(size=(m, n_latents))), y, x


def test_bends_of_a_strong_confound_raise_few_false_alarms_given_splines_and_many_given_a_line():
    alarms = {0: 0, 8: 0}
    for seed in range(40):
        values, y, x = bent(seed)
        for n_knots in alarms:
            null = null_of(values, y, np.zeros(len(y), int), splines(x, n_knots), n=99, seed=seed)
            alarms[n_knots] += null.p_max_t.min() <= 0.05
    assert alarms[0] == 40 and alarms[8] <= 6


def test_residuals_are_permuted_in_units_of_the_spread_so_that_sure_labels_stay_quiet():
    """Where the covariate says the label, permuted labels vary as little as the labels themselves do."""
    _, y, x = bent(0, m=400)
    columns, labels = SortedColumns.of(x), torch.from_numpy(y)[:, None]
    residuals = Residuals(splines(x, 8), np.zeros(len(y), int))
    (found,) = partial_statistics(columns, columns.value, labels, ("x",), residuals)
    (source,) = permuted(np.zeros(len(y), int), 500, seed=0)
    sure = torch.from_numpy(abs(x[:, 0]) > 1.7)
    plain = residuals.of(residuals.of(labels)[:, 0][source].T)
    in_units, as_they_are = (part.double().square().mean(1) for part in (found.labels(source), plain))
    assert float(in_units[sure].mean() / in_units[~sure].mean()) < 0.35
    assert float(as_they_are[sure].mean() / as_they_are[~sure].mean()) > 0.85


def test_constant_and_collinear_covariates_take_nothing_further_away():
    values, covariates, y, blocks = example(3)
    more = np.column_stack([covariates, covariates[:, 0] * 3 - covariates[:, 1], np.full(80, 7.1), blocks * 1.3])
    one, other = (Residuals(x, blocks) for x in (covariates, more))
    assert one.freedom == other.freedom == 80 - 4 - 2
    one, other = (null_of(values, y, blocks, x) for x in (covariates, more))
    np.testing.assert_allclose(one.z, other.z, atol=1e-9)
    assert (one.p_max_t == other.p_max_t).all()


def test_a_latent_that_covariates_explain_is_never_significant():
    values, covariates, y, blocks = example(4)
    values = values.astype(float)
    values[:, 2], values[:, 3] = 0, covariates[:, 0] * 2 + blocks
    null = null_of(values, y, blocks, covariates, by="activation")
    assert null.z[2:4].tolist() == [0, 0] and null.p[2:4].tolist() == [1, 1] and null.q_bh[2:4].tolist() == [1, 1]


def test_covariates_are_chosen_by_name_or_by_the_whole_they_are_of():
    all_of_it = Covariates(("length", "topic=food", "topic=sea"), np.arange(6.0).reshape(2, 3))
    assert all_of_it.named(("topic",)).names == ("topic=food", "topic=sea")
    assert all_of_it.named(("topic=sea", "length")).values.tolist() == [[0, 2], [3, 5]]
    with pytest.raises(ConfigError, match="no covariate is named colour: there are length, topic, topic=food"):
        all_of_it.named(("colour",))


def test_of_covariates_with_a_column_for_each_persona_its_own_is_given():
    words = Covariates(("length", "words=kind", "words=rude"), np.arange(6.0).reshape(2, 3), a_persona=("words",))
    assert words.named(("words", "length"), "rude").names == ("length", "words=rude")
    assert words.named(("words=kind",), "rude").names == ("words=kind",)
    with pytest.raises(ConfigError, match="no covariate is named words of calm: there are length, words, words=kind"):
        words.named(("words",), "calm")


def test_says_in_one_line_what_cannot_be():
    values, covariates, y, blocks = example(5)
    missing = Covariates(("length", "sentiment"), covariates.copy())
    missing.values[[1, 5], 1] = np.nan
    assert missing.at(np.array([0, 2]), "train").shape == (2, 2)
    with pytest.raises(DataError, match="'sentiment' is not a number at 1 of 3 train examples: fill it in"):
        missing.at(np.array([0, 1, 2]), "train")
    with pytest.raises(DataError, match=r"covariates are \[examples, 1\]"):
        Covariates(("length",), covariates)
    with pytest.raises(DataError, match="blocks and covariates explain 'x' wholly"):
        null_of(values, y, blocks, y[:, None] * 2.0 + 1)
    with pytest.raises(DataError, match="75 covariates and 4 blocks leave 1 of 80 examples"):
        Residuals(np.random.default_rng(0).normal(size=(80, 75)), blocks)


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    values, y, length = confounded(0)
    one, two = (null_of(values, y, np.zeros(len(y), int), length, device=device) for device in ("cpu", "cuda"))
    for name in ("z", "p", "p_max_t", "q_bh"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=2 / 200)
