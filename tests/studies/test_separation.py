import math

import numpy as np
import pytest

from sae_persona.studies.separation import auroc, auroc_gain, correlation, paired_auroc, wins


def test_auroc_is_the_share_of_wins():
    up, down = np.array([3.0, 1.0, 2.0]), np.array([0.0, 1.0])
    assert wins(up, down).mean() == pytest.approx(5.5 / 6)
    found = auroc(up, down)
    assert found.value == pytest.approx(5.5 / 6) and found.low < found.value
    assert math.isnan(auroc(up, down[:1]).low) and math.isnan(auroc(up, down[:0]).value)


def test_paired_intervals_shrink_with_prompts():
    generator = np.random.default_rng(0)
    widths = []
    for n in (20, 200):
        base = generator.normal(size=n)
        found = paired_auroc(base, base + generator.normal(1, 1, n), resamples=300, seed=0)
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_gain_has_the_sign_of_the_better_measure():
    y = np.arange(20) < 10
    good, bad = y + 0.0, np.random.default_rng(0).normal(size=20)
    gain = auroc_gain(good, bad, y, resamples=500, seed=0)
    assert gain.low > 0 and gain.value == pytest.approx(1 - wins(bad[y], bad[~y]).mean())
    loss = auroc_gain(bad, good, y, resamples=500, seed=0)
    assert loss.value == pytest.approx(-gain.value) and loss.high < 0
    assert auroc_gain(good, good, y, resamples=50, seed=0) == (0, 0, 0)


def test_correlation():
    x = np.array([0.0, 1, 2, 3, math.nan])
    pearson, spearman = correlation(x, x**3)
    assert spearman == pytest.approx(1) and 0.8 < pearson < 1
    assert all(map(math.isnan, correlation(x, np.ones(5))))
