"""Every measure against its definition, counted by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from sae_persona.errors import DataError
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU
from sae_persona.studies.relatedness import cofiring, jaccard, rank_biased_overlap, relatedness


def test_lists_overlap_by_their_first_ranks():
    assert rank_biased_overlap([1, 2, 3], [1, 2, 3]) == pytest.approx(1)
    assert rank_biased_overlap([1, 2], [3, 4]) == 0
    wanted = (1 * 0 + 0.9 * 1) / 1.9  # nothing in common at the first rank, all at the second
    assert rank_biased_overlap([1, 2], [2, 1]) == pytest.approx(wanted)
    first, last = rank_biased_overlap([1, 2, 3], [1, 8, 9]), rank_biased_overlap([1, 2, 3], [7, 8, 3])
    assert first > last and jaccard([1, 2, 3], [1, 8, 9]) == jaccard([1, 2, 3], [7, 8, 3]) == 0.2


def test_cofiring_is_counted_over_tokens():
    fires = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 2, 0]], np.float32)
    found = cofiring(sparse.csr_matrix(fires))
    a, b = (fires[:, k] > 0 for k in (0, 1))
    assert found["phi"][0, 1] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)
    assert found["NPMI"][0, 1] == pytest.approx(math.log(0.25 / 0.25) / -math.log(0.25))
    assert found["NPMI"][0, 2] == -1 and found["NPMI"][1, 2] == pytest.approx(0)
    assert found["firing given i"][0, 1] == pytest.approx(0.5 - 0.5) and found["firing given i"][0, 2] == -0.5
    assert np.isnan(found["phi"][0, 3]) and np.isnan(found["NPMI"][0, 3])


def test_directions_are_compared():
    torch.manual_seed(0)
    enc, dec, means = torch.randn(6, 4), torch.nn.functional.normalize(torch.randn(6, 4), dim=1), torch.randn(2, 4)
    sae = SAE(enc, torch.zeros(6), dec, torch.zeros(4), ReLU())
    fires = sparse.random(50, 6, 0.5, format="csr", random_state=0)
    found = relatedness(sae, means, [[4, 1, 2], [3, 1]], fires)
    cosine = torch.cosine_similarity(means[0], means[1], dim=0)
    assert found["cosine of means"][0, 1] == pytest.approx(cosine.item(), abs=1e-6)
    assert found["cosine of decoders"][1, 0] == pytest.approx((dec[4] @ dec[3]).item(), abs=1e-6)
    assert found["read-out"][0, 1] == pytest.approx((enc[3] @ dec[4]).item(), abs=1e-6)
    assert found["read-out"][1, 0] == pytest.approx((enc[4] @ dec[3]).item(), abs=1e-6)
    assert found["Jaccard"][0, 1] == pytest.approx(1 / 3)
    assert all(m.shape == (2, 2) for m in found.values()) and len(found) == 8
    with pytest.raises(DataError, match="no latent that rises with it"):
        relatedness(sae, means, [[4], []], fires)
