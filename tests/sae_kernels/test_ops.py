"""The CPU path against the oracles; the choice of path by the tensor in hand."""

import subprocess
import sys

import pytest
import torch
from sae_kernels import ops, reference


def inputs(ragged: bool):
    torch.manual_seed(0)
    acts, idx = torch.rand(6, 4, dtype=torch.float64), torch.randint(50, (6, 4))
    w_dec, rows = torch.randn(50, 33, dtype=torch.float64), torch.randn(6, 33, dtype=torch.float64)
    if ragged:
        return acts.flatten(), idx.flatten(), w_dec, torch.tensor([0, 0, 9, 10, 10, 24, 24]), rows
    return acts, idx, w_dec, None, rows


@pytest.mark.parametrize("ragged", [False, True], ids=["n k", "csr"])
def test_sparse_decode_and_its_gradients_match_reference(ragged):
    acts, idx, w_dec, offsets, rows = inputs(ragged)
    results = []
    for op in (ops.sparse_decode, reference.sparse_decode):
        a, w = acts.clone().requires_grad_(), w_dec.clone().requires_grad_()
        out = op(a, idx, w, offsets)
        out.backward(rows)
        results.append((out.detach(), a.grad, w.grad))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("ragged", [False, True], ids=["n k", "csr"])
def test_weight_grad_is_the_gradient_of_the_decoder(ragged):
    acts, idx, w_dec, offsets, rows = inputs(ragged)
    lists = ops.latent_lists(idx, len(w_dec), offsets)
    got = ops.weight_grad(lists, acts, rows)
    torch.testing.assert_close(got, reference.weight_grad(lists, acts, rows))
    w_dec.requires_grad_()
    reference.sparse_decode(acts, idx, w_dec, offsets).backward(rows)
    torch.testing.assert_close(got, w_dec.grad)


def test_the_cpu_path_never_imports_triton():
    code = """
import sys, torch
from sae_kernels import ops, reference
acts, idx, w = torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64), torch.rand(4, 5)
ops.sparse_decode(acts, idx, w); ops.weight_grad(ops.latent_lists(idx, 4), acts, torch.rand(3, 5)); ops.topk(w, 2)
sys.exit("triton" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
