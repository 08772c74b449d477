import math

import pytest
import torch
from sae_kernels import reference, values
from sae_kernels.adam import BETAS
from sae_kernels.scalars import begin, clip_factor, conclude, new_scalars

SIZES = [1, 24, 20_000]  # one program adds up at most 8192 at a time


def scalars(device):
    """Nothing in them that an op may take for its own."""
    return new_scalars(device) + torch.arange(9, device=device) + 20


def run(op, args, dtype):
    op(**args)
    return {"scalars": args["scalars"][:, None]}


@pytest.mark.parametrize("step", [1, 2, 1000])
def test_begin_matches_reference(step, device, agrees):
    args = {"scalars": scalars(device), "lr": 3e-4, "step": step, "betas": BETAS}
    agrees(run, begin, reference.begin, args, torch.float32)
    begin(**args)
    for place, beta in ((values.M_FIX, BETAS[0]), (values.V_FIX, BETAS[1])):
        assert args["scalars"][place].item() == pytest.approx(1 / (1 - beta**step), rel=1e-6)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("n", SIZES)
def test_conclude_matches_reference(n, blocks, device, agrees):
    torch.manual_seed(0)
    active = torch.randint(40, (n,), device=device).int()
    jump = {"active": active, "k": 5, "sparsity_coef": 7.0}
    for more in ({}, jump, {**jump, "n_dead": active[:1] + 1, "auxk_coef": 0.03, "k_aux": 50}):
        args = {"scalars": scalars(device), "squares": torch.rand(blocks, n, device=device), **more}
        agrees(run, conclude, reference.conclude, args, torch.float32)
        conclude(**args)
        untouched = {values.LR, values.M_FIX, values.V_FIX, values.STEP}
        untouched |= set() if "active" in more else {values.COUNT}
        untouched |= set() if "n_dead" in more else {values.AUX}
        assert all(args["scalars"][place] == 20 + place for place in untouched)
        assert args["scalars"][values.FACTOR] == 1 and args["scalars"][values.FLAGGED] == 20 + values.FLAGGED


def test_auxk_weighs_no_more_once_more_are_dead_than_it_keeps(device):
    weights = []
    for n_dead in (5, 50, 500):
        s = scalars(device)
        n_dead = torch.tensor([n_dead], dtype=torch.int32, device=device)
        conclude(s, torch.ones(1, 8, device=device), n_dead=n_dead, auxk_coef=0.5, k_aux=50)
        weights.append(s[values.AUX].item())
    assert weights == pytest.approx([0.1 * 0.5 / 4, 0.5 / 4, 0.5 / 4])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])  # of the last the sum is infinite
def test_a_loss_that_is_not_finite_is_flagged_and_stops_the_step(bad, device):
    s, squares = new_scalars(device), torch.ones(2, 3000, device=device)
    conclude(s, squares)
    squares[1, 1000] = squares[0, 7] = bad
    for flagged in (1, 2):
        conclude(s, squares)
        assert s[values.FACTOR] == 0 and s[values.FLAGGED] == flagged
        for norm in (torch.nan, torch.inf, 0.0):  # nobody wrote the norms, since the factor was 0
            clip_factor(s, torch.full((5,), norm, device=device), 1.0)
            assert s[values.FACTOR] == 0
    conclude(s, torch.ones(2, 3000, device=device))
    assert s[values.FACTOR] == 1 and s[values.FLAGGED] == 2 and s[values.LOSS] == 2
    clip_factor(s, torch.full((5,), torch.nan, device=device), 1.0)
    assert s[values.FACTOR] == 0


@pytest.mark.parametrize("clip", [0.5, 1e6])
@pytest.mark.parametrize("m", SIZES)
def test_clip_factor_matches_reference(m, clip, device, agrees):
    torch.manual_seed(0)
    args = {"scalars": scalars(device), "norms": torch.rand(m, device=device), "clip": clip}
    args["scalars"][values.FACTOR] = 1
    agrees(run, clip_factor, reference.clip_factor, args, torch.float32)
    clip_factor(**args)
    assert args["scalars"][values.FACTOR].item() == pytest.approx(
        min(1, clip / args["norms"].sum().sqrt().item()), 1e-5
    )
