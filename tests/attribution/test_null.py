"""The null: exact moments by enumeration, the rate of false alarms, power, and a confound that blocking removes."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import sparse, stats

from sae_persona.attribution.midranks import SortedColumns
from sae_persona.attribution.null import permutation_null, permutation_test, permuted, rank_statistics


def outcome(values, y, blocks, *, n=199, seed=0, direction=None):
    columns = SortedColumns.of(sparse.csr_matrix(values))
    return permutation_test(columns, y, blocks, permutations=n, seed=seed, direction=direction)


def simulated(generator, *, effect=0.0, n_latents=20, n_blocks=8, size=15):
    """Sparse latents and labels that both depend on the block; given the block, on each other only by ``effect``."""
    blocks = np.repeat(np.arange(n_blocks), size)
    y = generator.random(len(blocks)) < generator.uniform(0.2, 0.8, n_blocks)[blocks]
    values = (
        generator.exponential(size=(len(blocks), n_latents)) + generator.exponential(size=(n_blocks, n_latents))[blocks]
    )
    values *= generator.random(values.shape) < 0.5
    values[:, 0] += abs(effect) * (y if effect > 0 else ~y)
    return values, y, blocks


def test_permuted_labels_stay_in_their_blocks():
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 5, 60)
    y = generator.random(60) < 0.4
    source = np.concatenate([part.numpy() for part in permuted(blocks, 1100, seed=0)])
    assert source.shape == (1100, 60)
    assert (np.sort(source, axis=1) == np.arange(60)).all() and (blocks[source] == blocks).all()
    drawn = y[source]
    assert len(np.unique(drawn, axis=0)) > 1000
    # each example gets each of its block's labels as often as another
    np.testing.assert_allclose(drawn.mean(0), [y[blocks == block].mean() for block in blocks], atol=0.08)


def test_z_uses_the_exact_moments_of_all_permutations():
    values = np.array([[0, 1.0], [2, 1], [0, 0], [3, 0], [0, 5], [1, 0], [7, 2]])
    y = np.array([True, True, False, True, False, False, True])
    blocks = np.array([0, 0, 0, 1, 1, 1, 2])
    sums = []
    ranks = stats.rankdata(values, axis=0)
    for first in permutations(y[:3]):
        sums += [ranks[np.array([*first, *second, y[6]])].sum(0) for second in permutations(y[3:6])]
    wanted = (ranks[y].sum(0) - np.mean(sums, 0)) / np.std(sums, 0)
    np.testing.assert_allclose(outcome(values, y, blocks).z, wanted, rtol=1e-12)


def test_every_p_and_q_is_a_plain_count_over_the_permutations():
    values, y, blocks = simulated(np.random.default_rng(7), effect=1, n_latents=6)
    values[:, 5] = 0  # counts nowhere
    ranks = stats.rankdata(values, axis=0)

    def z(labels):
        sizes, ones = np.bincount(blocks), np.bincount(blocks, y)
        mean = sum(ones[b] * ranks[blocks == b].mean(0) for b in range(8))
        variance = sum(ones[b] * (1 - ones[b] / sizes[b]) * ranks[blocks == b].var(0, ddof=1) for b in range(8))
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(abs(ranks[labels > 0].sum(0) - mean) / np.sqrt(variance))

    drawn = y[np.concatenate([part.numpy() for part in permuted(blocks, 99, seed=0)])]
    null, seen = np.array([z(labels) for labels in drawn]), z(y)
    got = outcome(values, y, blocks, n=99, seed=0)
    np.testing.assert_allclose(abs(got.z), seen, atol=1e-9)
    reaches = null[:, :, None] >= seen - 1e-9  # permutation, latent that is permuted, latent that is judged
    np.testing.assert_allclose(got.p, (1 + np.einsum("bii->i", reaches.astype(int))) / 100)
    np.testing.assert_allclose(got.p_max_t, (1 + reaches.any(1).sum(0)) / 100)
    pooled = (1 + reaches[:, :5, :5].sum((0, 1))) / (1 + 99 * 5)
    q = np.array([min(5 * p / (pooled <= p).sum() for p in pooled if p >= own) for own in pooled])
    # pooled counts take in the rest of the cell that a latent's own statistic is in
    assert (got.q_bh[:5] >= q - 1e-12).all() and got.q_bh[5] == 1
    np.testing.assert_allclose(got.q_bh[:5], q, rtol=0.02)


def test_p_is_the_share_of_all_permutations_that_reach_it():
    values = np.array([[0.0], [1], [4], [2], [3], [0]])
    y = np.array([False, False, True, False, True, True])
    blocks = np.array([0, 0, 0, 1, 1, 1])
    ranks = stats.rankdata(values[:, 0])
    sums = np.array([ranks[np.array([*a, *b])].sum() for a in permutations(y[:3]) for b in permutations(y[3:])])
    distance = np.abs(sums - sums.mean())
    wanted = np.mean(distance >= abs(ranks[y].sum() - sums.mean()) - 1e-9)
    assert outcome(values, y, blocks, n=20_000).p[0] == pytest.approx(wanted, abs=0.01)
    assert outcome(values, y, blocks, n=20_000, direction=np.ones(1)).p[0] == pytest.approx(
        np.mean(sums >= ranks[y].sum()), abs=0.01
    )


def test_false_alarms_come_at_the_rate_that_is_asked_for():
    generator = np.random.default_rng(1)
    found = [outcome(*simulated(generator), n=99, seed=i) for i in range(400)]
    family = np.mean([null.p_max_t.min() <= 0.05 for null in found])
    single = np.mean([null.p[3] <= 0.05 for null in found])
    # 5 % of 400, four standard errors either way
    assert 0.007 < family < 0.094 and 0.007 < single < 0.094, (family, single)
    assert np.mean([null.q_bh.min() <= 0.05 for null in found]) < 0.094


def test_an_effect_is_found_and_its_sign_kept():
    generator = np.random.default_rng(2)
    found = [outcome(*simulated(generator, effect=sign * 2), seed=i) for i in range(20) for sign in (1, -1)]
    signs = np.array([1, -1] * 20)
    hits = np.array([null.p_max_t[0] <= 0.05 and null.q_bh[0] <= 0.05 for null in found])
    assert hits.mean() > 0.9
    assert (np.sign([null.z[0] for null in found]) == signs)[hits].all()


def test_a_confound_of_the_block_fools_only_the_unblocked_test():
    generator = np.random.default_rng(3)
    blocks = np.repeat([0, 1], 100)
    y = generator.random(200) < np.where(blocks, 0.8, 0.2)
    values = generator.exponential(size=(200, 5)) + 3 * blocks[:, None]
    assert outcome(values, y, np.zeros(200, int)).p_max_t.max() <= 0.01
    assert outcome(values, y, blocks).p_max_t.min() > 0.05


def test_max_t_is_over_all_latents_and_never_below_the_latents_own_p():
    values, y, blocks = simulated(np.random.default_rng(4), effect=2)
    null = outcome(values, y, blocks)
    assert (null.p_max_t >= null.p).all() and null.p_max_t.min() >= 1 / 200
    alone = outcome(values[:, :1], y, blocks)
    assert alone.p_max_t[0] == alone.p[0] == null.p[0]


def test_latents_that_no_permutation_moves_are_never_significant():
    values, y, blocks = simulated(np.random.default_rng(5))
    values[:, 0], values[:, 1] = 0, blocks  # silent, and constant in every block
    null = outcome(values, y, blocks)
    assert null.z[:2].tolist() == [0, 0] and null.p[:2].tolist() == [1, 1] and null.q_bh[:2].tolist() == [1, 1]


def test_rounding_is_not_a_variance():
    generator = np.random.default_rng(8)
    blocks = np.repeat(np.arange(40), generator.integers(2, 30, 40))
    y = generator.random(len(blocks)) < 0.37
    constant_in_blocks = generator.integers(1, 6, (40, 50))[blocks]
    assert (outcome(constant_in_blocks, y, blocks, n=9).z == 0).all()


def test_labels_tested_together_are_tested_as_if_alone():
    values, y, blocks = simulated(np.random.default_rng(9), effect=1)
    columns = SortedColumns.of(sparse.csr_matrix(values))
    both = torch.from_numpy(np.stack([y, ~y, np.roll(y, 3)], axis=1))
    found = permutation_null(columns, rank_statistics(columns, both, blocks), blocks, permutations=99, seed=4)
    for i, null in enumerate(found):
        alone = permutation_test(columns, both[:, i].numpy(), blocks, permutations=99, seed=4)
        np.testing.assert_allclose(null.z, alone.z, atol=1e-12)
        assert all((getattr(null, name) == getattr(alone, name)).all() for name in ("p", "p_max_t", "q_bh"))
    np.testing.assert_allclose(found[0].z, -found[1].z, atol=1e-12)


def test_z_is_that_of_mann_and_whitney():
    """In one block, with ties: scipy's U, its tie-corrected normal approximation without a continuity correction."""
    generator = np.random.default_rng(10)
    values = generator.integers(-1, 4, (50, 6)) * (generator.random((50, 6)) < 0.6)
    y = generator.random(50) < 0.4
    wanted = [stats.mannwhitneyu(c[y], c[~y], method="asymptotic", use_continuity=False) for c in values.T]
    z = outcome(values, y, np.zeros(50, int), n=9).z
    np.testing.assert_allclose(2 * stats.norm.sf(abs(z)), [found.pvalue for found in wanted], rtol=1e-9)
    middle = y.sum() * (~y).sum() / 2
    assert (np.sign(z) == np.sign([found.statistic - middle for found in wanted])).all()


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    values, y, blocks = simulated(np.random.default_rng(11), effect=1, n_latents=300)
    here, there = (SortedColumns.of(sparse.csr_matrix(values), device) for device in ("cpu", "cuda"))
    one, two = (permutation_test(columns, y, blocks, permutations=1500, seed=0) for columns in (here, there))
    for name in ("p", "p_max_t", "q_bh"):
        assert (getattr(one, name) == getattr(two, name)).all(), name
    np.testing.assert_allclose(one.z, two.z, atol=1e-12)


def test_the_seed_decides():
    case = simulated(np.random.default_rng(6), effect=1)
    assert (outcome(*case, seed=5).p == outcome(*case, seed=5).p).all()
    assert (outcome(*case, seed=5).p != outcome(*case, seed=6).p).any()
