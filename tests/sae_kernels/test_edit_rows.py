import math

import pytest
import torch
from sae_kernels import reference
from sae_kernels.edit_rows import MAX_ROWS, edit_rows

gpu = pytest.mark.gpu
HALF = [pytest.param(dtype, marks=gpu) for dtype in (torch.bfloat16, torch.float16)]
SHAPES = [(1, 8, 1), (17, 100, 3), (5, 64, 16), (33, 130, 17)]  # n, d, m
LARGE = [(1, 4096, 8), (32, 4096, 8), (2048, 2304, 128)]


def arguments(n, d, m, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x, enc, dec = (torch.randn(size, d, generator=g) for size in (n, m, m))
    on = torch.rand(n, m, generator=g) < 0.7
    on[0] = False
    line = torch.tensor([[0.0, 3.0, -math.inf, math.inf], [1.0, 0.0, -math.inf, 1.0], [2.0, -1.0, 0.0, math.inf]])
    threshold = torch.tensor([0.0, 1.5, -math.inf])
    which = torch.arange(m) % 3
    made = {
        "x": x, "on": on, "enc": enc / d**0.5, "bias": torch.randn(m, generator=g), "threshold": threshold[which],
        "dec": dec / d**0.5, "line": line[which],
    }  # fmt: skip
    return {name: value.to(device) for name, value in made.items()}


def run(op, args, dtype):
    return {"out": op(**(args | {"x": args["x"].to(dtype)}))}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("n", "d", "m"), SHAPES)
def test_matches_reference(n, d, m, dtype, device, poison, agrees):
    agrees(run, edit_rows, reference.edit_rows, arguments(n, d, m, device), dtype)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "m"), LARGE)
def test_matches_reference_at_sizes_that_are_used(n, d, m, dtype, agrees):
    agrees(run, edit_rows, reference.edit_rows, arguments(n, d, m, "cuda"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_tokens_at_which_nothing_changes_come_out_bit_for_bit(dtype, device, poison):
    args = arguments(20, 48, 4, device)
    args["x"] = args["x"].to(dtype)
    args["x"][3, 5] = -0.0
    args["on"][:10] = False
    args["line"][:] = torch.tensor([1.0, 0.0, -math.inf, math.inf])
    out = edit_rows(**args)
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    assert torch.equal(out.view(bits), args["x"].view(bits))


def test_no_tokens(device):
    assert edit_rows(**arguments(1, 8, 2, device) | {"x": torch.empty(0, 8, device=device), "on": torch.empty(
        0, 2, dtype=torch.bool, device=device)}).shape == (0, 8)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, "x must be one of"),
        ({"enc": torch.zeros(2, 9)}, r"enc and dec must be \[m, 8\] with m from 1 to 128, got \[2, 9\]"),
        ({"on": torch.zeros(4, 2)}, r"on must be bool \[4, 2\] and line \[2, 4\], got torch.float32"),
        ({"line": torch.zeros(2, 3)}, r"on must be bool \[4, 2\] and line"),
        ({"bias": torch.zeros(2).bfloat16()}, "must be fp32"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        edit_rows(**arguments(4, 8, 2) | changed)
    assert MAX_ROWS == 128


@gpu
def test_a_graph_can_hold_it():
    args = arguments(32, 4096, 8, "cuda")
    args["x"] = args["x"].bfloat16()
    wanted = edit_rows(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = edit_rows(**args)
    graph.replay()
    assert torch.equal(out, wanted)
