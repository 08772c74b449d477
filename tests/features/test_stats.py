"""LatentStats: against plain NumPy on the dense matrix, and halves against the whole."""

import h5py
import numpy as np
import pytest
import torch

from sae_persona.errors import ConfigError, DataError
from sae_persona.features.stats import LatentStats
from sae_persona.types import SparseLatents

N_LATENTS, K = 12, 4


def tokens(n: int, seed: int) -> SparseLatents:
    """Random latents; 0 and 1 never fire, and some entries are the zeros of a token with fewer than k."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, N_LATENTS - 2, generator=generator).argsort(1)
    acts = torch.randn(n, K, generator=generator).exp()
    return SparseLatents(acts * (torch.rand(n, K, generator=generator) > 0.2), order[:, :K] + 2)


def measured(*parts: SparseLatents) -> LatentStats:
    stats = LatentStats(N_LATENTS)
    for part in parts:
        stats.update(part)
    return stats


def test_agrees_with_the_dense_matrix():
    latents = tokens(3000, seed=0)
    dense = latents.dense(N_LATENTS).double().numpy()
    stats = measured(latents)
    assert stats.n_tokens == 3000
    np.testing.assert_allclose(stats.firing_rate, (dense > 0).mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.mean, dense.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.variance, dense.var(0), rtol=1e-9)
    np.testing.assert_array_equal(stats.maximum, dense.max(0))
    assert (stats.histogram.sum(1) == stats.fired).all()


@pytest.mark.parametrize("q", [0.0, 0.01, 0.5, 0.9, 0.999, 1.0])
def test_quantiles_are_within_a_bin_of_those_of_the_non_zero_activations(q):
    latents = tokens(4000, seed=1)
    dense = latents.dense(N_LATENTS).numpy()
    got = measured(latents).quantile(q).numpy()
    assert np.isnan(got[:2]).all(), "a latent that never fired has no quantile"
    for latent in range(2, N_LATENTS):
        active = np.sort(dense[dense[:, latent] > 0, latent])
        # the two order statistics around q, and one bin beyond
        low, high = active[int(np.floor(q * (len(active) - 1)))], active[int(np.ceil(q * (len(active) - 1)))]
        assert low / (1 + 1 / 16) <= got[latent] <= high * (1 + 1 / 16), (q, latent)
        assert got[latent] <= active.max()


def test_activations_beyond_the_bins_are_counted_and_the_maximum_bounds_quantiles():
    acts = torch.tensor([[1e-7], [1e9], [3.0]])
    stats = LatentStats(1)
    stats.update(SparseLatents(acts, torch.zeros(3, 1, dtype=torch.int64)))
    assert int(stats.histogram.sum()) == 3
    assert int(stats.histogram[0, 0]) == 1 and int(stats.histogram[0, -1]) == 1
    assert stats.maximum.item() == pytest.approx(1e9)


def test_two_halves_are_the_whole():
    first, second = tokens(700, seed=2), tokens(300, seed=3)
    whole, halves = measured(first, second), measured(first)
    halves.merge(measured(second))
    assert halves.n_tokens == whole.n_tokens
    for name in ("fired", "maximum", "histogram"):
        assert torch.equal(getattr(halves, name), getattr(whole, name)), name
    for name in ("total", "squares"):
        torch.testing.assert_close(getattr(halves, name), getattr(whole, name), rtol=1e-14, atol=0)
    assert torch.equal(halves.p999.nan_to_num(), whole.p999.nan_to_num())


def test_a_varying_number_of_latents_a_token_is_counted_too():
    latents = tokens(200, seed=4)
    fires = latents.acts > 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), fires.sum(1).cumsum(0)])
    ragged = measured(SparseLatents(latents.acts[fires], latents.idx[fires], offsets))
    regular = measured(latents)
    assert ragged.n_tokens == regular.n_tokens and torch.equal(ragged.histogram, regular.histogram)


def test_goes_through_a_file(tmp_path):
    stats = measured(tokens(100, seed=5))
    with h5py.File(tmp_path / "stats.h5", "w") as file:
        stats.to_h5(file.create_group("stats"))
    with h5py.File(tmp_path / "stats.h5") as file:
        again = LatentStats.from_h5(file["stats"])
    assert again.n_tokens == 100
    for name in ("fired", "total", "squares", "maximum", "histogram"):
        assert torch.equal(getattr(again, name), getattr(stats, name)), name


def test_refuses_other_widths_and_quantiles_that_are_none():
    with pytest.raises(DataError, match="5 latents cannot be merged"):
        LatentStats(4).merge(LatentStats(5))
    with pytest.raises(ConfigError, match="between 0 and 1, got 99"):
        LatentStats(4).quantile(99)
