import pytest
import torch
from sae_kernels import reference
from sae_kernels.rescore import rescore

gpu = pytest.mark.gpu
SHAPES = [(1, 1, 1, 1, 16), (3, 4, 2, 9, 48), (2, 7, 7, 20, 300), (2, 5, 1, 40, 1040)]  # n, m, k, n_latents, d
LARGE = [(512, 64, 32, 4096, 768), (64, 200, 100, 1000003, 80), (64, 64, 32, 4096, 4096)]


def inputs(n, m, k, n_latents, d, device, dtype=torch.float32):
    torch.manual_seed(0)
    candidates = torch.stack([torch.randperm(n_latents, device=device)[:m].sort().values for _ in range(n)]).int()
    x, w, b = (torch.randn(*s, device=device) for s in ((n, d), (n_latents, d), (n_latents,)))
    return {"candidates": candidates, "x": x.to(dtype), "w": w.to(dtype), "b": b, "k": k}


def run(op, args, dtype):
    acts, idx = op(**args)
    return {"acts": acts, "idx": idx}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, device, poison, agrees):
    agrees(run, rescore, reference.rescore, inputs(*shape, device), torch.float32)


@gpu
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_bf16_matches_reference(shape, device, poison, agrees):
    args = inputs(*shape, device, torch.bfloat16)
    args["b"] += 0.01 * torch.arange(len(args["b"]), device=device)  # no near ties, which may fall either way
    agrees(run, rescore, reference.rescore, args, torch.float32)


def test_equal_scores_the_first_and_those_below_0_as_0(device, poison):
    args = inputs(3, 6, 3, 12, 16, device)
    args["x"], args["w"] = args["x"].round(), args["w"].sign()  # exact
    args["w"][:] = args["w"][0]
    args["b"][:] = -100.0
    acts, idx = rescore(**args)
    assert (acts == 0).all() and torch.equal(idx, args["candidates"][:, :3])
    args["b"][args["candidates"][1, 4:].long()] = 100.0
    for got, wanted in zip(rescore(**args), reference.rescore(**args), strict=True):
        assert torch.equal(got, wanted)


def test_candidates_keep_their_order(device, poison):
    args = inputs(3, 6, 4, 40, 16, device)
    args["candidates"] = args["candidates"].flip(1).contiguous()
    assert (rescore(**args)[1].diff(dim=1) < 0).all()


def test_refuses_what_the_contract_excludes(device):
    args = inputs(3, 4, 2, 9, 48, device)
    for bad in ({"candidates": args["candidates"].long()}, {"k": 0}, {"k": 5}):
        with pytest.raises(ValueError, match=r"candidates must be int32 \[n, at least k"):
            rescore(**args | bad)
    for bad in ({"w": args["w"].double()}, {"w": args["w"][:, :16]}, {"x": args["x"][:2]}):
        with pytest.raises(ValueError, match="x and w must be"):
            rescore(**args | bad)
