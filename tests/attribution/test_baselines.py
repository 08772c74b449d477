"""The dense baselines against what they are by definition, and matching by firing rate."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from sae_persona.attribution.baselines import dense_baselines, difference_of_means, logistic_probe, random_latents
from sae_persona.attribution.labels import Selection


def residuals(seed: int, effect: float, n: int = 200, d_in: int = 6) -> tuple[np.ndarray, Selection, Selection]:
    generator = np.random.default_rng(seed)
    y = np.tile([True, False], n // 2)
    x = generator.normal(size=(n, d_in)) * np.arange(1, d_in + 1) + 7
    x[:, 2] += effect * y
    half = np.arange(n) < n // 2
    splits = [Selection(y[part], np.flatnonzero(part), np.zeros(n // 2, int)) for part in (half, ~half)]
    return x.astype(np.float32), splits[0], splits[1]


def test_the_probe_orders_examples_as_scikit_learns_does():
    x, train, held_out = residuals(0, effect=3)
    scaler = StandardScaler().fit(x[train.rows].astype(float))
    probe = LogisticRegression(C=0.1).fit(scaler.transform(x[train.rows].astype(float)), train.y)
    wanted = probe.decision_function(scaler.transform(x[held_out.rows].astype(float)))
    got = x[held_out.rows] @ logistic_probe(x[train.rows], train.y, 0.1)
    np.testing.assert_allclose(got - got.mean(), wanted - wanted.mean(), atol=1e-3)


def test_directions_are_fitted_on_train_and_tested_on_held_out():
    x, train, held_out = residuals(1, effect=6)
    means, probe = dense_baselines(x, train, held_out, probe_c=0.1, permutations=99, seed=0)
    direction = x[train.rows][train.y].mean(0) - x[train.rows][~train.y].mean(0)
    np.testing.assert_allclose(difference_of_means(x[train.rows], train.y), direction, rtol=1e-5)
    for split, got in ((train, means.auroc), (held_out, means.held_out_auroc)):
        assert got.value == pytest.approx(roc_auc_score(split.y, x[split.rows] @ direction))
    assert means.name == "difference of means" and probe.name == "logistic probe"
    assert means.held_out_p == probe.held_out_p == 0.01
    assert probe.held_out_auroc.value > 0.9


def test_where_there_is_nothing_only_train_looks_good():
    found = [dense_baselines(*residuals(seed, effect=0), probe_c=0.1, permutations=19, seed=0) for seed in range(20)]
    for i in range(2):
        assert np.mean([bases[i].auroc.value for bases in found]) > 0.58
        assert abs(np.mean([bases[i].held_out_auroc.value for bases in found]) - 0.5) < 0.04


def test_random_latents_are_the_nearest_in_firing_rate():
    rates = np.array([0.1, 0.5, 0.09, 0.12, 0.9, 0.01])
    found = random_latents(rates, np.array([0.99, 0, 0.6, 0.7, 0, 0]), best=0, n=2)
    assert (found.n, found.mean, found.p95) == (2, pytest.approx(0.65), pytest.approx(0.695))
    assert random_latents(rates, rates, best=0, n=100).n == 5
    assert np.isnan(random_latents(rates[:1], rates[:1], best=0, n=3).mean)
