"""Co-firing: against the dense product, and a sample that does not depend on the order."""

import h5py
import numpy as np
import pytest
import torch

from sae_persona.errors import DataError
from sae_persona.features import cofiring
from sae_persona.features.cofiring import CoFiring
from sae_persona.features.firings import chance

N_LATENTS = 9


def sampled(n_tokens: int, *corpora) -> CoFiring:
    found = CoFiring(N_LATENTS, n_tokens)
    for corpus in corpora:
        found.update(corpus.firings)
    found.settle()
    return found


def same(a: CoFiring, b: CoFiring) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("drawn", "offsets", "idx"))


@pytest.mark.parametrize("n_tokens", [10_000, 100])
@pytest.mark.parametrize("block", [4, 2**25])
def test_counts_are_those_of_the_dense_product_on_the_sample(make_corpus, monkeypatch, n_tokens, block):
    monkeypatch.setattr(cofiring, "_COUNTS", block * N_LATENTS)
    monkeypatch.setattr(cofiring, "_AT_ONCE", 7)
    corpus = make_corpus(0, n=30, n_latents=N_LATENTS)
    found = sampled(n_tokens, corpus)
    lowest = chance(corpus.rows.place, -1).argsort()[:n_tokens]
    fires = (corpus.dense[lowest] > 0).double().numpy()
    assert found.n == len(fires)
    both, mine = fires.T @ fires, fires.sum(0)
    np.testing.assert_array_equal(found.fires(), mine)
    near = found.neighbours(N_LATENTS)
    for latent in range(N_LATENTS):
        there = near.partner[latent] >= 0
        partners = near.partner[latent][there].numpy()
        others = [i for i in range(N_LATENTS) if i != latent and both[latent, i]]
        assert sorted(partners) == others
        np.testing.assert_array_equal(near.both[latent][there], both[latent, partners])
        jaccard = both[latent, partners] / (mine[latent] + mine[partners] - both[latent, partners])
        np.testing.assert_allclose(near.jaccard[latent][there], jaccard, rtol=1e-6)
        assert (np.diff(jaccard) <= 0).all()
        pmi = np.log(both[latent, partners] * len(fires) / (mine[latent] * mine[partners]))
        np.testing.assert_allclose(near.pmi[latent][there], pmi, rtol=1e-5, atol=1e-6)
    one = found.neighbours(2, torch.tensor([4]))
    assert torch.equal(one.partner[0], near.partner[4, :2]) and torch.equal(one.both[0], near.both[4, :2])


def test_parts_in_any_order_are_one_sample(make_corpus, tmp_path):
    corpus = make_corpus(1, n=40, n_latents=N_LATENTS)
    whole = sampled(60, corpus)
    assert same(sampled(60, *(corpus.part(i, i + 1) for i in reversed(range(len(corpus.pieces))))), whole)
    half = sampled(60, corpus.part(1, every=2))
    half.merge(sampled(60, corpus.part(0, every=2)))
    assert same(half, whole)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        half.to_h5(file.create_group("cofiring"))
        again = CoFiring.from_h5(file["cofiring"])
    assert same(again, whole) and (again.n_latents, again.n_tokens) == (N_LATENTS, 60)


def test_latents_that_fire_alone_have_no_neighbours(make_corpus):
    corpus = make_corpus(2, n_latents=N_LATENTS)
    alone = torch.zeros_like(corpus.dense)
    alone[::2, 3], alone[1::2, 5] = 1, 1
    near = sampled(500, type(corpus)(corpus.pieces, alone)).neighbours(4)
    assert (near.partner == -1).all() and (near.both == 0).all() and near.pmi.isnan().all()


def test_refuses_other_sizes():
    with pytest.raises(DataError, match="sample of 5 tokens of 3 latents cannot be merged into one of 6 of 3"):
        CoFiring(3, 6).merge(CoFiring(3, 5))
