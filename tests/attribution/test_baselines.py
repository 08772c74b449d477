"""The dense baselines against what they are by definition, and matching by firing rate."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler

from sae_persona.attribution.baselines import (
    PROBE_GRID,
    dense_baselines,
    difference_of_means,
    logistic_probe,
    pca_direction,
    probe_penalty,
    random_directions,
    random_latents,
)
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
    means, probe, component = dense_baselines(x, train, held_out, probe_c=0.1, permutations=99, seed=0)
    direction = x[train.rows][train.y].mean(0) - x[train.rows][~train.y].mean(0)
    np.testing.assert_allclose(difference_of_means(x[train.rows], train.y), direction, rtol=1e-5)
    for split, got in ((train, means.auroc), (held_out, means.held_out_auroc)):
        assert got.value == pytest.approx(roc_auc_score(split.y, x[split.rows] @ direction))
    assert means.name == "difference of means" and probe.name == "logistic probe"
    assert (probe.note, component.name, means.note) == ("C 0.1, given", "PCA direction", "")
    assert means.held_out_p == probe.held_out_p == 0.01
    assert probe.held_out_auroc.value > 0.9


def test_where_there_is_nothing_only_train_looks_good():
    found = [dense_baselines(*residuals(seed, effect=0), probe_c=0.1, permutations=19, seed=0) for seed in range(20)]
    for i in range(3):
        assert np.mean([bases[i].auroc.value for bases in found]) > 0.58
        assert abs(np.mean([bases[i].held_out_auroc.value for bases in found]) - 0.5) < 0.04


def test_random_latents_are_the_nearest_in_firing_rate():
    rates = np.array([0.1, 0.5, 0.09, 0.12, 0.9, 0.01])
    found = random_latents(rates, np.array([0.99, 0, 0.6, 0.7, 0, 0]), best=0, n=2)
    assert (found.n, found.mean, found.p95) == (2, pytest.approx(0.65), pytest.approx(0.695))
    assert random_latents(rates, rates, best=0, n=100).n == 5
    assert np.isnan(random_latents(rates[:1], rates[:1], best=0, n=3).mean)


def test_the_penalty_is_the_one_that_does_best_on_groups_left_out():
    """By hand, in fp64 and to the end, over the same folds."""
    x, train, _ = residuals(3, effect=1, n=160)
    x, groups = x[train.rows].astype(float), np.arange(80) // 8
    losses = dict.fromkeys(PROBE_GRID, 0.0)
    for fit, test in StratifiedGroupKFold(5, shuffle=True, random_state=4).split(x, train.y, groups):
        assert not set(groups[fit]) & set(groups[test])
        scaler = StandardScaler().fit(x[fit])
        for c in PROBE_GRID:
            probe = LogisticRegression(C=c, max_iter=10_000).fit(scaler.transform(x[fit]), train.y[fit])
            losses[c] += log_loss(train.y[test], probe.predict_proba(scaler.transform(x[test])), labels=[0, 1])
    assert probe_penalty(x, train.y, groups, seed=4) == min(losses, key=losses.__getitem__)


def test_a_probe_that_learns_the_template_by_heart_is_not_rewarded():
    """Each group's label can be read off a column of its own, which tells nothing about other groups."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 10)
    y = generator.random(20)[groups] < 0.5
    y ^= generator.random(200) < 0.1
    x = np.eye(20)[groups] * 5 + generator.normal(size=(200, 20)) * 0.1
    over_groups, over_examples = (probe_penalty(x, y, g, seed=0) for g in (groups, np.zeros(200, int)))
    assert over_groups < 0.01 <= over_examples


def test_cross_validation_is_what_no_penalty_asks_for():
    x, train, held_out = residuals(5, effect=3)
    chosen = probe_penalty(x[train.rows].astype(float), train.y, train.blocks, seed=0)
    settings = {"permutations": 19, "seed": 0}
    alone, given = (dense_baselines(x, train, held_out, probe_c=c, **settings)[1] for c in (None, chosen))
    assert alone.held_out_auroc == given.held_out_auroc
    assert alone.note == f"C {chosen:g}, cross-validated"


def test_the_pca_direction_is_a_component_chosen_and_turned_on_train():
    generator = np.random.default_rng(0)
    y = np.arange(300) % 3 == 0
    x = generator.normal(size=(300, 30)) * 0.1
    x[:, 4] += generator.normal(size=300) * 9  # the first component tells nothing
    x[:, 7] += 4 - 8 * y  # the second one falls with the label
    direction, number = pca_direction(x.astype(np.float32), y, seed=0)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    assert number == 2 and direction @ vectors[:, np.argsort(-values)[1]] == pytest.approx(
        np.sign(vectors[7, np.argsort(-values)[1]]) * -1, abs=1e-3
    )
    assert roc_auc_score(y, x @ direction) > 0.99


def test_random_directions_by_definition():
    x, train, held_out = residuals(2, effect=9)
    found = random_directions(x, train, held_out, n=60, seed=3)
    drawn = np.random.default_rng(3).normal(size=(6, 60))
    aurocs = []
    for direction in drawn.T:
        on_train, on_held = (roc_auc_score(part.y, x[part.rows] @ direction) for part in (train, held_out))
        aurocs.append(on_held if on_train >= 0.5 else 1 - on_held)
    assert (found.n, found.mean) == (60, pytest.approx(np.mean(aurocs), abs=1e-6))
    assert found.p95 == pytest.approx(np.quantile(aurocs, 0.95), abs=1e-6)
    nothing = [random_directions(*residuals(seed, effect=0), seed=seed).mean for seed in range(20)]
    assert abs(np.mean(nothing) - 0.5) < 0.03
