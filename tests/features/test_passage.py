import numpy as np
import pytest
import torch
from scipy import sparse, stats

from sae_persona.errors import DataError
from sae_persona.features.passage import surprise
from sae_persona.features.stats import LatentStats
from sae_persona.types import SparseLatents


@pytest.fixture(scope="module")
def corpus():
    """Latents on 4,000 tokens: 0 fires often and weakly, 1 seldom, 2 often with any strength, 3 never, 4 always."""
    random = np.random.default_rng(0)
    acts = np.zeros((4000, 5), np.float32)
    acts[:, 0] = np.where(random.random(4000) < 0.5, 0.1, 0)
    acts[:, 1] = np.where(random.random(4000) < 0.002, 1, 0)
    acts[:, 2] = np.where(random.random(4000) < 0.5, random.exponential(1, 4000), 0)
    acts[:, 4] = 1
    found = LatentStats(5)
    found.update(SparseLatents(torch.from_numpy(acts), torch.arange(5).expand(4000, 5)))
    return acts, found


def test_it_is_the_least_binomial_tail(corpus):
    acts, measured = corpus
    passage = np.zeros((10, 5), np.float32)
    passage[:4, 0], passage[2, 1], passage[:5, 2] = 0.1, 1, [0.2, 2, 1.5, 3, 2.5]
    passage[:, 4] = 1
    found = surprise(sparse.csr_matrix(passage), measured)
    for latent, value, times in zip(found.latents, found.surprise, found.times, strict=True):
        strongest = -np.sort(-passage[:, latent][passage[:, latent] > 0])
        # bins are 1/16 of an octave wide: the corpus is counted from the bin's lower edge
        edge = 2.0 ** np.floor(np.log2(strongest))
        edge *= 1 + np.floor((strongest / edge - 1) * 16) / 16
        shares = [((acts[:, latent] >= a).sum() + 1) / 4001 for a in edge]
        tails = [stats.binom.sf(j, 10, share) for j, share in enumerate(shares)]
        assert value == pytest.approx(-np.log10(min(tails)), rel=1e-6), latent
        assert times == pytest.approx(passage[:, latent].mean() / acts[:, latent].mean(), rel=1e-5)
    assert set(found.latents.tolist()) == {0, 1, 2, 4}
    assert found.latents[-1] == 4  # as always
    assert (np.diff(found.surprise) <= 0).all()


def test_both_more_often_and_harder_count(corpus):
    _, measured = corpus
    usual, often, hard = (np.zeros((20, 5), np.float32) for _ in range(3))
    usual[:5, 2], often[:, 2], hard[:5, 2] = 0.7, 0.7, 8
    values = [surprise(sparse.csr_matrix(x), measured).surprise[0] for x in (usual, often, hard)]
    assert values[0] < 1 < 5 < min(values[1:])


def test_a_latent_that_never_fired_before(corpus):
    passage = np.zeros((2, 5), np.float32)
    passage[0, 3] = 1
    found = surprise(sparse.csr_matrix(passage), corpus[1])
    assert found.latents.tolist() == [3]
    assert np.isinf(found.times[0])
    assert found.surprise[0] == pytest.approx(-np.log10(1 - (1 - 1 / 4001) ** 2), rel=1e-6)


def test_nothing_fires_and_another_width(corpus):
    assert len(surprise(sparse.csr_matrix((3, 5), dtype=np.float32), corpus[1]).latents) == 0
    with pytest.raises(DataError, match="the passage has 4 latents, the statistics 5"):
        surprise(sparse.csr_matrix((3, 4), dtype=np.float32), corpus[1])
