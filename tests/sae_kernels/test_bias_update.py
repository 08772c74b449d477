import pytest
import torch
from sae_kernels import reference, values
from sae_kernels.bias_update import bias_update, column_sums
from sae_kernels.scalars import new_scalars

gpu = pytest.mark.gpu
SHAPES = [(1, 16), (130, 48), (1300, 144), pytest.param((8200, 2304), marks=gpu)]  # n, d; 1300: more than 8 sums


def inputs(n, d, device, factor=1.0, step=3):
    torch.manual_seed(0)
    pull, b, m = (torch.randn(*s, device=device) for s in ((n, d), (d,), (d,)))
    s = new_scalars(device)
    reference.begin(s, 1e-2, step, values.BETAS)
    s[values.FACTOR] = factor
    return {"pull": pull, "b": b, "m": m, "v": torch.rand(d, device=device), "scalars": s, "scale": 0.01}


def run(column_sums, bias_update, norms=False):
    def both(_, args, dtype):
        sums, args = column_sums(args["pull"]), {name: one for name, one in args.items() if name != "pull"}
        wanted = {"norms": torch.full_like(args["b"], torch.nan)} if norms else {}
        bias_update(**args, sums=sums, **wanted)
        return {"sums": sums, **{name: args[name] for name in "bmv"}, **wanted}

    return both


def check(agrees, args, norms):
    ops = {0: run(column_sums, bias_update, norms), 1: run(reference.column_sums, reference.bias_update, norms)}
    agrees(lambda which, args, dtype: ops[which](None, args, dtype), 0, 1, args, torch.float32)


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, norms, device, poison, agrees):
    check(agrees, inputs(*shape, device, factor=0.25), norms)


@gpu
def test_bf16_errors(device, poison, agrees):
    args = inputs(1300, 144, device)
    check(agrees, args | {"pull": args["pull"].bfloat16()}, norms=False)


def test_is_adam(device):
    args = inputs(130, 48, device, step=1)
    args["m"].zero_()
    args["v"].zero_()
    b = args["b"].clone().requires_grad_()
    b.grad = args["pull"].sum(dim=0) * args["scale"]
    torch.optim.Adam([b], lr=1e-2).step()
    run(column_sums, bias_update)(None, args, None)
    torch.testing.assert_close(args["b"], b.detach())


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
def test_factor_0_and_norms_change_nothing(norms, device):
    args = inputs(130, 48, device, factor=1.0 if norms else 0.0)
    args["pull"][3, 4] = torch.nan
    before = {name: args[name].clone() for name in "bmv"}
    run(column_sums, bias_update, norms)(None, args, None)
    assert all(torch.equal(args[name], before[name]) for name in "bmv")


def test_repeats_bit_for_bit(device):
    found = [run(column_sums, bias_update)(None, inputs(1300, 144, device), None) for _ in range(2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_refuses_what_the_contract_excludes(device):
    args = inputs(130, 48, device)
    for b in (args["b"][:47], args["b"].double()):
        with pytest.raises(ValueError, match=r"b must be fp32 \[48\] like the columns of sums"):
            run(column_sums, bias_update)(None, args | {"b": b}, None)
