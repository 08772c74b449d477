import numpy as np
import pytest
from scipy.stats import spearmanr

from sae_persona.attribution.agreement import agreement


def drawn(noise: float, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    exact = np.where(generator.random(n) < 0.3, 0, generator.normal(size=n))  # ties, as latents that do not fire make
    return exact + noise * generator.normal(size=n), exact


def test_spearman_is_scipys_with_ties():
    estimate, exact = drawn(0.5)
    found = agreement("gradient", "train", estimate, exact, 400, np.random.default_rng(1))
    assert found.spearman.value == pytest.approx(spearmanr(estimate, exact)[0])
    assert found.spearman.low < found.spearman.value < found.spearman.high
    moved = exact != 0
    assert found.same_sign == np.mean((estimate[moved] > 0) == (exact[moved] > 0))
    assert (found.n, found.estimate, found.split) == (60, "gradient", "train")


def test_more_noise_less_agreement():
    near, far = (agreement("gradient", "train", *drawn(x), 200, np.random.default_rng(1)) for x in (0.1, 5))
    assert near.spearman.low > far.spearman.high and near.same_sign > far.same_sign


def test_where_nothing_moves_there_is_no_agreement():
    found = agreement("delta", "held_out", np.arange(5.0), np.zeros(5), 50, np.random.default_rng(1))
    assert all(map(np.isnan, (*found.spearman, found.same_sign)))
