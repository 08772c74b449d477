import pytest
import torch
from sae_kernels import reference
from sae_kernels.latent_lists import latent_lists

OFFSETS = 50 * torch.tensor([0, 0, 5, 5, 11, 12, 12])  # tokens without entries at the ends and between


@pytest.mark.parametrize("offsets", [None, OFFSETS], ids=["n k", "csr"])
@pytest.mark.parametrize("n_latents", [9, 2**16 + 1])  # both ways of sorting
def test_matches_reference(n_latents, offsets):
    torch.manual_seed(0)
    idx = torch.randint(n_latents - 2, (300, 2))
    idx[::3] = idx[0]
    idx = idx if offsets is None else idx.flatten()
    got, wanted = latent_lists(idx, n_latents, offsets), reference.latent_lists(idx, n_latents, offsets)
    for name in ("entry", "token", "offsets"):
        assert torch.equal(getattr(got, name).long(), getattr(wanted, name)), name


def test_sums_add_what_belongs_to_a_latent():
    lists = latent_lists(torch.tensor([[3, 0], [3, 3]]), 5)
    assert lists.sums(torch.tensor([[1.0, 2.0], [4.0, 8.0]])).tolist() == [2.0, 0.0, 0.0, 13.0, 0.0]
