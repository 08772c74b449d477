"""The Triton kernels against their oracles."""

import pytest
import torch
from sae_kernels import reference
from sae_kernels.latent_lists import latent_lists
from sae_kernels.sparse_decode import MAX_D_IN, sparse_decode, weight_grad

SHAPES = [(1, 1, 1, 1), (5, 3, 7, 48), (9, 4, 130, 257), (4, 8, 64, 1100)]  # n, k, n_latents, d_in
FP32, BF16 = torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


def inputs(shape, dtype, device, ragged):
    n, k, n_latents, d_in = shape
    torch.manual_seed(0)
    idx = torch.randint(n_latents, (n, k), device=device)
    idx[:, -1] = idx[:, 0]  # a repeat in every row
    acts, w_dec, grad_out = (
        torch.randn(*s, dtype=dtype, device=device) for s in ((n, k), (n_latents, d_in), (n, d_in))
    )
    if not ragged:
        return acts, idx, w_dec, None, grad_out
    offsets = torch.linspace(0, n * k, n + 1, device=device).long()
    offsets[1:-1] = offsets[1]  # tokens without entries, and one with most of them
    return acts.flatten(), idx.flatten(), w_dec, offsets, grad_out


def run(op, dtype, acts, idx, w_dec, offsets, grad_out):
    acts, w_dec = (x.detach().to(dtype).requires_grad_() for x in (acts, w_dec))
    out = op(acts, idx, w_dec, offsets)
    out.backward(grad_out.to(dtype))
    return {"out": out.detach(), "d_acts": acts.grad, "d_w_dec": w_dec.grad}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("ragged", [False, True], ids=["n k", "csr"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, ragged, dtype, device, poison):
    """No further from the fp64 answer than twice plain torch's own distance in the same dtype."""
    args = inputs(shape, dtype, device, ragged)
    got, plain = run(sparse_decode, dtype, *args), run(reference.sparse_decode, dtype, *args)
    for name, exact in run(reference.sparse_decode, torch.float64, *args).items():
        error, allowed = ((x[name].double() - exact).norm() / exact.norm() for x in (got, plain))
        assert error <= 2 * allowed + torch.finfo(dtype).eps, f"{name}: {error:.1e} off, plain torch {allowed:.1e}"


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_weight_grad_matches_reference_and_repeats_bit_for_bit(shape, device, poison):
    acts, idx, w_dec, _, rows = inputs(shape, torch.float32, device, ragged=False)
    lists = latent_lists(idx, len(w_dec))
    got = weight_grad(lists, acts, rows)
    torch.testing.assert_close(got, reference.weight_grad(lists, acts, rows))
    assert torch.equal(got, weight_grad(lists, acts, rows))
    assert torch.equal(got, weight_grad(lists, acts, rows.T.contiguous().T))  # rows that are not row-major


def test_backward_takes_an_expanded_gradient(device):
    acts, idx, w_dec, _, _ = inputs(SHAPES[1], torch.float32, device, ragged=False)
    acts.requires_grad_()
    sparse_decode(acts, idx, w_dec).sum().backward()  # .sum() hands back a stride-0 gradient
    torch.testing.assert_close(acts.grad, w_dec.sum(dim=1)[idx])


def test_refuses_what_the_contract_excludes(device):
    acts, idx, w_dec, _, _ = inputs(SHAPES[1], torch.float32, device, ragged=False)
    with pytest.raises(ValueError, match=r"idx must be int64 \[5, 3\]"):
        sparse_decode(acts, idx[:, :2], w_dec)
    with pytest.raises(ValueError, match="acts and w_dec must share"):
        sparse_decode(acts, idx, w_dec.bfloat16())
    with pytest.raises(ValueError, match="d_in must be at most"):
        sparse_decode(acts, idx, w_dec.new_zeros(7, MAX_D_IN + 1))
    with pytest.raises(ValueError, match=r"acts must be \[n, k\]"):
        sparse_decode(acts.flatten(), idx.flatten(), w_dec)
    with pytest.raises(ValueError, match="offsets must be int64"):
        sparse_decode(acts.flatten(), idx.flatten(), w_dec, torch.zeros(6, dtype=torch.int32))
