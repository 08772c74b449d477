import pytest
import torch
from sae_kernels import reference
from sae_kernels import topk as module
from sae_kernels.topk import GROUP, topk


@pytest.fixture(autouse=True)
def no_row_is_short(monkeypatch):
    monkeypatch.setattr(module, "SHORT", 0)


@pytest.mark.parametrize("k", [1, 5, 16, 17, 300])  # both sides of the switch to torch.topk, which is at k = 16
@pytest.mark.parametrize("cols", [64 * GROUP, 64 * GROUP + 1])
def test_matches_reference(k, cols):
    torch.manual_seed(0)
    x = torch.randn(7, cols)
    x[0] = torch.arange(cols)  # all of the top in one group
    x[1] = -torch.arange(cols)
    for got, wanted in zip(topk(x, k), reference.topk(x, k), strict=True):
        assert torch.equal(got, wanted)


def test_equal_values_are_all_found_once():
    x = torch.zeros(2, 64 * GROUP)
    x[:, ::GROUP] = 1.0
    values, idx = topk(x, 16)
    assert (values == 1).all() and torch.equal(x.gather(1, idx), values)
    assert all(len(set(row)) == 16 for row in idx.tolist())
