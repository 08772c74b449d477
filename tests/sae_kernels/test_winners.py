import pytest
import torch
from sae_kernels import reference
from sae_kernels.winners import winners

SHAPES = [(2, 5, 1), (2, 7, 3), (3, 4, 5), (8, 2, 6)]  # ranks, n, k


def candidates(ranks, n, k, device, levels=None):
    """Activations that `select` may have given, a third of them 0; few ``levels``: with many ties."""
    g = torch.Generator(device).manual_seed(0)
    acts = torch.randn(ranks, n, k, generator=g, device=device).relu()
    if levels:
        acts = (acts * levels).round() / levels
    idx = torch.stack([torch.randperm(50, generator=torch.Generator().manual_seed(i))[:k] for i in range(n)])
    return acts, idx.sort(dim=1).values.int().to(device)


def same(got, wanted):
    for name in ("acts", "idx", "offsets", "active"):
        assert torch.equal(getattr(got, name).nan_to_num(99), getattr(wanted, name).nan_to_num(99)), name


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, levels, device, poison):
    everyone, idx = candidates(*shape, device, levels)
    for rank in range(shape[0]):
        same(winners(everyone, idx, rank, 50), reference.winners(everyone, idx, rank, 50))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ranks_together_have_the_largest_of_all_lowest_latents_first(shape, device, poison):
    ranks, n, k = shape
    everyone, idx = candidates(*shape, device, levels=2)
    found = [winners(everyone, idx, rank, 50) for rank in range(ranks)]
    for i in range(n):
        got = []
        for rank, one in enumerate(found):
            own = slice(int(one.offsets[i]), int(one.offsets[i + 1]))
            got += list(zip((50 * rank + one.idx[own]).tolist(), one.acts[own].tolist(), strict=True))
        pairs = zip(
            (idx[i] + 50 * torch.arange(ranks, device=device)[:, None]).flatten().tolist(),
            everyone[:, i].flatten().tolist(),
            strict=True,
        )
        best = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k]
        assert got == sorted(pair for pair in best if pair[1] > 0)
        assert all(int(one.active[i]) == len(got) for one in found)


def test_nan_wins_and_is_handed_on(device, poison):
    everyone, idx = candidates(2, 3, 2, device)
    everyone[1, 2, 0] = torch.nan
    found = winners(everyone, idx, 1, 50)
    assert found.acts[found.offsets[2] : found.offsets[3]].isnan().any()
    assert not winners(everyone, idx, 0, 50).acts.isnan().any()


def test_refuses_what_the_contract_excludes(device):
    everyone, idx = candidates(2, 3, 2, device)
    for bad in ((everyone.double(), idx), (everyone, idx.long()), (everyone, idx[:2])):
        with pytest.raises(ValueError, match=r"everyone and idx must be fp32 \[ranks, n, k\] and int32 \[3, 2\], got"):
            winners(*bad, 0, 50)
    with pytest.raises(ValueError, match="2 ranks times k must be at most 16384, got 20000"):
        winners(torch.zeros(2, 1, 10000, device=device), torch.zeros(1, 10000, dtype=torch.int32, device=device), 0, 50)
