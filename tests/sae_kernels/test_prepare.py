import pytest
import torch
from sae_kernels import reference
from sae_kernels.prepare import FP8, prepare

gpu = pytest.mark.gpu
SHAPES = [(1, 1, 16), (3, 16, 16), (5, 33, 48), pytest.param((512, 2300, 2304), marks=gpu)]  # n, d_in, d


def inputs(shape, device, dtype=torch.float32, ordered=True):
    n, d_in, d = shape
    g = torch.Generator().manual_seed(0)
    x, mean = 3 * torch.randn(n, d_in, generator=g) + 2, torch.randn(d_in, generator=g)
    x[:, :2] *= 100  # outliers, at the end once they are reordered
    order = torch.arange(d_in - 1, -1, -1).int()
    args = {"x": x.to(dtype), "order": order if ordered else None, "mean": mean}
    return {**{name: one if one is None else one.to(device) for name, one in args.items()}, "scale": 0.7, "d": d}


def run(op, args, dtype):
    args = dict(args)
    z = torch.full((len(args["x"]), args.pop("d")), torch.nan, dtype=dtype, device=args["x"].device)
    op(**args, z=z)
    return {"z": z}


@pytest.mark.parametrize("ordered", [False, True], ids=["as they are", "ordered"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, ordered, device, agrees):
    agrees(run, prepare, reference.prepare, inputs(shape, device, ordered=ordered), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)])
def test_takes_half_precision(dtype, device, agrees):
    agrees(run, prepare, reference.prepare, inputs((3, 20, 32), device, dtype), torch.float32)


@gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounds_to_bf16(shape, device, agrees):
    agrees(run, prepare, reference.prepare, inputs(shape, device, torch.bfloat16), torch.bfloat16)


@gpu
@pytest.mark.parametrize("side", [0, 32])
@pytest.mark.parametrize("shape", [(3, 40, 48), (512, 2300, 2304)], ids=str)
def test_e4m3_is_the_row_over_its_scale_and_0_in_the_side_columns(shape, side, device):
    args = inputs(shape, device, torch.bfloat16)
    args["x"][1] = args["mean"].flip(0)  # a row of about zeros
    n, d = shape[0], args.pop("d")
    found = []
    for op in (prepare, reference.prepare):
        z = torch.full((n, d), torch.nan, device=device, dtype=torch.bfloat16)
        z8, scale = torch.full_like(z, torch.nan).to(FP8), torch.full((n,), torch.nan, device=device)
        op(**args, z=z, z8=z8, z8_scale=scale, side=side)
        found.append((z8.float(), scale))
    (z8, scale), (wanted, wanted_scale) = found
    torch.testing.assert_close(scale, wanted_scale)
    assert (z8[:, :side] == 0).all() and (z8.abs().amax(dim=1)[2:] == 448).all()
    # three bits of mantissa: a division that rounds differently may end at the neighbour, seldom
    assert ((z8 - wanted).abs() <= wanted.abs() / 8 + 2**-9).all() and (z8 != wanted).float().mean() < 1e-3


def test_nothing_changes_with_mean_0_and_scale_1(device):
    args = inputs((3, 16, 16), device, ordered=False) | {"scale": 1.0}
    args["mean"] = torch.zeros_like(args["mean"])
    assert torch.equal(run(prepare, args, torch.float32)["z"], args["x"])


def test_refuses_what_the_contract_excludes(device):
    args = inputs((3, 16, 16), device)
    with pytest.raises(ValueError, match=r"x must be floats \[3, 16\], got torch.int64"):
        run(prepare, args | {"x": args["x"].long()}, torch.float32)
    with pytest.raises(ValueError, match=r"x must be floats \[3, 15\]"):
        run(prepare, args | {"mean": args["mean"][1:]}, torch.float32)
    del args["d"]
    with pytest.raises(ValueError, match=r"x must be floats \[4, 16\]"):
        prepare(**args, z=torch.empty(4, 16, device=device))
