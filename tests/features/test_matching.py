"""match() against whole matrices of cosines and correlations."""

import numpy as np
import pytest
import torch

from sae_persona.errors import ConfigError, DataError, FormatError, ModelError
from sae_persona.features.matching import MatchConfig, Matching, match
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, TopK

D = 12


def dictionary(n, seed, rule=None):
    generator = torch.Generator().manual_seed(seed)
    w = torch.nn.functional.normalize(torch.randn(n, D, generator=generator), dim=1)
    return SAE(w, torch.full((n,), -0.3), w, torch.zeros(D), rule or ReLU())


def reordered(sae, order, rule=None):
    return SAE(sae.w_enc[order], sae.b_enc[order], sae.w_dec[order], sae.b_dec, rule or sae.rule)


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(n, D, generator=generator) for n in (60, 1, 40)]


@pytest.mark.parametrize("block", [7, 64])
def test_nearest_are_those_of_the_whole_matrix(block):
    a, b = dictionary(40, 0), dictionary(29, 1)
    found = match(a, b, config=MatchConfig(block=block))
    whole = (a.w_dec @ b.w_dec.T).numpy()
    assert (found.nearest_ab == whole.argmax(1)).all()
    assert (found.nearest_ba == whole.argmax(0)).all()
    assert found.cosine_ab == pytest.approx(whole.max(1), abs=1e-6)
    assert found.cosine_ba == pytest.approx(whole.max(0), abs=1e-6)
    mutual = [whole[:, whole[i].argmax()].argmax() == i for i in range(40)]
    assert found.mutual.tolist() == mutual
    assert 0 < sum(mutual) < 40
    assert found.correlation_ab is None


def test_a_reordered_dictionary_is_found_again(batches):
    a, order = dictionary(30, 0), torch.randperm(30, generator=torch.Generator().manual_seed(2))
    found = match(a, reordered(a, order), acts=batches, config=MatchConfig(block=8, one_to_one=True))
    assert found.nearest_ba.tolist() == order.tolist()
    assert found.mutual.all()
    assert found.correlation_ab == pytest.approx(np.ones(30), abs=1e-6)
    assert found.assigned_ab.tolist() == found.nearest_ab.tolist()
    summary = found.summary()
    assert summary["mutual_above_0.9"] == summary["above_0.9_ba"] == 1
    assert summary["tokens"] == 101


@pytest.mark.parametrize("rule", [ReLU(), TopK(3)], ids=["relu", "topk"])
def test_correlations_are_those_of_dense_activations(rule, batches):
    a, b = dictionary(20, 0, rule), dictionary(15, 1, rule)
    config = MatchConfig(candidates=4, cofiring=3, first_tokens=50)
    found = match(a, b, acts=batches, config=config)
    x = torch.cat(batches)
    dense = [sae.encode(x).dense(sae.n_latents).double().numpy() for sae in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = np.corrcoef(*dense, rowvar=False)[:20, 20:]
    assert found.correlation_ab == pytest.approx(whole[np.arange(20), found.nearest_ab], abs=1e-5, nan_ok=True)
    known = found.correlated_ab >= 0
    assert known.sum() > 15
    chosen = whole[np.arange(20), found.correlated_ab][known]
    assert found.correlated_r[known] == pytest.approx(chosen, abs=1e-5)
    near = np.argsort(-(a.w_dec @ b.w_dec.T).numpy(), axis=1)[:, :4]
    assert (found.correlated_r[known] >= np.nanmax(np.take_along_axis(whole, near, 1)[known], axis=1) - 1e-5).all()


def test_latents_that_fire_together_are_found_however_their_directions_lie(batches):
    a = dictionary(30, 0)
    turned = SAE(a.w_enc.flip(0), a.b_enc, a.w_dec, a.b_dec, a.rule)  # encoders reversed, decoders not
    config = MatchConfig(candidates=1, cofiring=1)
    found = match(a, turned, acts=batches, config=config)
    fires = found.correlated_ab >= 0
    assert (found.correlated_ab[fires] == 29 - np.arange(30)[fires]).mean() > 0.9
    blind = match(a, turned, acts=batches, config=MatchConfig(candidates=1, cofiring=0))
    assert (blind.nearest_ab == np.arange(30)).all()
    assert np.nanmax(blind.correlation_ab) < 0.9


def test_latents_that_never_fire_have_no_correlation(batches):
    a = dictionary(8, 0)
    a.b_enc[2] = -100
    found = match(a, a, acts=batches)
    assert np.isnan(found.correlation_ab).tolist() == [i == 2 for i in range(8)]
    assert found.correlated_ab[2] == -1
    assert found.pairs(8)[[p["a"] for p in found.pairs(8)].index(2)]["correlation"] is None


def test_a_file_is_what_was_saved(tmp_path, batches):
    a, b = dictionary(12, 0), dictionary(10, 1)
    for acts in (None, batches):
        found = match(a, b, acts=acts)
        found.save(tmp_path / "m.h5")
        again = Matching.load(tmp_path / "m.h5")
        for name, value in vars(found).items():
            np.testing.assert_equal(getattr(again, name), value)
    (tmp_path / "m.h5").write_bytes(b"no")
    with pytest.raises(FormatError, match="not a whole matching file"):
        Matching.load(tmp_path / "m.h5")


def test_what_cannot_be_matched_is_refused():
    a = dictionary(5, 0)
    narrow = SAE(a.w_enc[:, :4], a.b_enc, a.w_dec[:, :4], a.b_dec[:4], a.rule)
    with pytest.raises(ModelError, match="of widths 12 to 12 and 4 to 4: compare SAEs of one hook point"):
        match(a, narrow)
    with pytest.raises(DataError, match="no token"):
        match(a, a, acts=[])
    with pytest.raises(ConfigError, match="at least 1"):
        MatchConfig(block=0)
    wide = SAE(torch.ones(5000, 1), torch.ones(5000), torch.ones(5000, 1), torch.zeros(1), ReLU())
    with pytest.raises(ConfigError, match="one_to_one takes up to 4096 latents, got 5000"):
        match(wide, wide, config=MatchConfig(one_to_one=True))
