"""Every measure against another implementation: scikit-learn, scipy, or the formula written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, special, stats
from sklearn.metrics import roc_auc_score

from sae_persona.attribution.association import associate
from sae_persona.attribution.midranks import SortedColumns


def example(seed: int, m: int = 60, n_latents: int = 8, zeros: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Latents with many zeros and many ties; the label moves some of them."""
    generator = np.random.default_rng(seed)
    y = generator.random(m) < 0.4
    y[:4] = True, True, False, False
    values = generator.integers(1, 9, (m, n_latents)) / 2 + y[:, None] * np.arange(n_latents) / 4
    return values * (generator.random((m, n_latents)) > zeros), y


def measured(values: np.ndarray, y: np.ndarray):
    return associate(SortedColumns.of(sparse.csr_matrix(values)), y)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(5, 40))
def test_auroc_is_scikit_learns(seed, zeros, m):
    values, y = example(seed, m, 3, zeros)
    wanted = [roc_auc_score(y, column) for column in values.T]
    np.testing.assert_allclose(measured(values, y).auroc.value, wanted, rtol=0, atol=1e-12)


def test_auroc_of_negative_and_of_dense_values_is_scikit_learns():
    values, y = example(3)
    for shifted in (values - 2, np.random.default_rng(0).normal(size=(60, 4))):
        wanted = [roc_auc_score(y, column) for column in shifted.T]
        np.testing.assert_allclose(measured(shifted, y).auroc.value, wanted, atol=1e-12)


def delong(column: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """DeLong's variance as the paper writes it (the kernel over all pairs, its marginal means), on the logit scale."""
    kernel = (np.sign(column[y][:, None] - column[~y][None, :]) + 1) / 2
    v10, v01 = kernel.mean(1), kernel.mean(0)
    deviation = np.sqrt(v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01))
    a = kernel.mean()
    half = stats.norm.ppf(0.975) * deviation / (a * (1 - a))
    return special.expit(special.logit(a) - half), special.expit(special.logit(a) + half)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_interval_is_delongs(seed):
    values, y = example(seed)
    auroc = measured(values, y).auroc
    np.testing.assert_allclose(np.transpose([auroc.low, auroc.high]), [delong(c, y) for c in values.T], atol=1e-12)


@pytest.mark.parametrize("auroc", [0.7, 0.95, 0.99, 0.998])
def test_auroc_interval_covers(auroc):
    """Of 400 samples of 60 + 120 normals, at least nine in ten hold the true AUROC in their 95 % interval."""
    rng, y = np.random.default_rng(0), np.arange(180) < 60
    values = rng.standard_normal((180, 400)) + y[:, None] * np.sqrt(2) * stats.norm.ppf(auroc)
    found = measured(values - values.min() + 1, y).auroc
    assert ((found.low <= auroc) & (auroc <= found.high)).mean() > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_correlation_and_its_interval_are_scipys(seed):
    values, y = example(seed)
    r = measured(values, y).r
    for i, column in enumerate(values.T):
        wanted = stats.pearsonr(column, y)
        assert r.value[i] == pytest.approx(wanted.statistic, abs=1e-12)
        assert r.value[i] == pytest.approx(stats.pointbiserialr(y, column).statistic, abs=1e-12)
        assert (r.low[i], r.high[i]) == pytest.approx(tuple(wanted.confidence_interval()), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_difference_and_its_interval_are_welchs(seed):
    values, y = example(seed)
    difference = measured(values, y).difference
    for i, column in enumerate(values.T):
        wanted = stats.ttest_ind(column[y], column[~y], equal_var=False).confidence_interval()
        assert difference.value[i] == pytest.approx(column[y].mean() - column[~y].mean())
        assert (difference.low[i], difference.high[i]) == pytest.approx((wanted.low, wanted.high))


def test_cohens_d_and_its_interval_are_the_formulas():
    values, y = example(7)
    d = measured(values, y).d
    n1, n0 = y.sum(), (~y).sum()
    for i, column in enumerate(values.T):
        pooled = ((n1 - 1) * column[y].var(ddof=1) + (n0 - 1) * column[~y].var(ddof=1)) / (n1 + n0 - 2)
        wanted = (column[y].mean() - column[~y].mean()) / np.sqrt(pooled)
        deviation = np.sqrt((n1 + n0) / (n1 * n0) + wanted**2 / (2 * (n1 + n0)))
        assert d.value[i] == pytest.approx(wanted)
        assert d.low[i] == pytest.approx(wanted - 1.959964 * deviation, abs=1e-6)
        assert d.high[i] == pytest.approx(wanted + 1.959964 * deviation, abs=1e-6)


def test_the_95_percent_interval_of_auroc_covers_95_percent():
    generator = np.random.default_rng(0)
    y = np.arange(120) < 50
    values = generator.normal(size=(120, 2000)) + y[:, None]
    truth = stats.norm.cdf(1 / np.sqrt(2))
    auroc = measured(values, y).auroc
    assert 0.93 < np.mean((auroc.low <= truth) & (truth <= auroc.high)) < 0.97


def test_latents_that_do_not_vary_or_separate_perfectly_give_limits_and_no_warning():
    y = np.arange(20) < 10
    found = measured(np.stack([np.zeros(20), y * 1.0, np.full(20, 3.0)], axis=1), y)
    assert found.auroc.value.tolist() == [0.5, 1, 0.5]
    assert found.auroc.at(1)[0] == found.auroc.at(1)[2] == 1
    assert 0.7 < found.auroc.at(1)[1] < 0.9
    assert np.isnan(found.r.value[[0, 2]]).all() and found.r.value[1] == 1
    assert found.difference.at(1) == (1, 1, 1)
