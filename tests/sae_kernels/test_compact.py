from itertools import pairwise

import pytest
import torch
from sae_kernels import compact, reference
from sae_kernels.compact import batch_topk, jump, new_entries

gpu = pytest.mark.gpu
BF16 = pytest.param(torch.bfloat16, marks=gpu)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, BF16])
SHAPES = [(1, 1, 1, 32), (3, 40, 3, 32), (4, 203, 2, 32), (3, 700, 1, 32), (3, 203, 2, 64)]  # n, n_latents, k, chunk
LARGE = [(512, 4096, 32, 64), (5000, 1003, 8, 32), (64, 1000003, 64, 64), (9000, 512, 2, 32)]


@pytest.fixture
def few_at_once(monkeypatch):
    """Programs take several turns."""
    monkeypatch.setattr(compact, "AT_ONCE", 64)


def as_encoded(rows: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """pre and maxima of rows [n, n_latents], as `encode` leaves them."""
    n, n_latents = rows.shape
    padded = -(-n_latents // chunk) * chunk
    maxima = torch.nn.functional.pad(rows, (0, padded - n_latents), value=-torch.inf).view(n, -1, chunk).amax(dim=2)
    return torch.nn.functional.pad(rows, (0, padded - n_latents), value=torch.nan), maxima


def random(n: int, n_latents: int) -> torch.Tensor:
    torch.manual_seed(0)
    rows = torch.randn(n, n_latents)
    rows[0] += 2  # a token that takes most of the places
    return rows


def check_batch(rows: torch.Tensor, k: int, chunk: int = 32) -> compact.Entries:
    n_latents = rows.shape[1]
    found = batch_topk(*as_encoded(rows, chunk), n_latents, k)
    wanted = reference.batch_topk(*as_encoded(rows, chunk), n_latents, k)
    for name in ("offsets", "idx", "acts"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    return found


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_topk_matches_reference(shape, dtype, device, poison):
    n, n_latents, k, chunk = shape
    check_batch(random(n, n_latents).to(device, dtype), k, chunk)


@DTYPES
def test_of_values_equal_to_the_level_the_first_across_tokens(dtype, device, poison, few_at_once):
    rows = torch.full((4, 200), -1.0)
    rows[1, 190:] = 0.5
    rows[2, 5:105] = 0.5  # the level: ten of the first token that has it, then some of the next
    rows[0, :3], rows[2, 150], rows[3, 7], rows[3, 90] = 2.0, 0.9, 0.75, 0.5
    found = check_batch(rows.to(device, dtype), 5)
    assert found.offsets.tolist() == [0, 3, 13, 19, 20]
    check_batch(torch.full((3, 70), 0.5).to(device, dtype), 2)


@DTYPES
def test_only_what_is_positive(dtype, device, poison):
    rows = torch.full((3, 70), -1.0)
    rows[1, 66], rows[2, 0], rows[2, 1] = 3.0, 0.0, 1e-30
    found = check_batch(rows.to(device, dtype), 4)
    assert found.idx.tolist() == [66, 1] + [70] * 10 and found.offsets.tolist() == [0, 0, 1, 2]
    assert (check_batch(torch.full((2, 70), -1.0).to(device, dtype), 1).idx == 70).all()


@DTYPES
def test_a_token_with_all_and_tokens_with_none(dtype, device, poison, few_at_once):
    rows = random(4, 130) - 5
    rows[2] = torch.linspace(1, 2, 130)
    found = check_batch(rows.to(device, dtype), 3)
    assert found.offsets.tolist() == [0, 0, 0, 12, 12]


def test_levels_that_differ_in_their_last_bits(device, poison, few_at_once):
    rows = 1 + torch.randperm(300, generator=torch.Generator().manual_seed(0)).view(3, 100) * 2.0**-23
    check_batch(rows.to(device), 5)
    check_batch((rows * 1e-38).to(device), 5)
    rows[0, :4] = 1e30  # wider than the histogram
    check_batch(rows.to(device), 5)


def test_groups_of_tokens_share_a_bound(device, poison, monkeypatch):
    monkeypatch.setattr(compact, "GROUP", 2)
    rows = random(5, 203)
    rows[2:4] -= 1
    check_batch(rows.to(device), 2)


@DTYPES
def test_most_tokens_have_few_positive_ones(dtype, device, poison):
    """Then the bound is not above 0."""
    rows = random(5, 203) - 6
    rows[1] = -0.5  # above the bound
    rows[1, 20:120:5] = torch.linspace(0.5, 8, 20)
    rows[4, 3:6] = 1e-5
    check_batch(rows.to(device, dtype), 2)


@gpu
@DTYPES
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_batch_topk_of_many_matches_reference(shape, dtype, device, poison):
    n, n_latents, k, chunk = shape
    check_batch(random(n, n_latents).to(device, dtype), k, chunk)


@gpu
def test_batch_topk_beyond_2_to_the_31(device):
    n, n_latents, k = 33000, 65536, 4
    rows = torch.randn(n, n_latents, device=device, dtype=torch.bfloat16)
    rows[-1, -5:] = 100.0
    pre, maxima = rows, rows.view(n, -1, 64).amax(dim=2)
    found = batch_topk(pre, maxima, n_latents, k)
    assert found.offsets[-1] == n * k and found.idx[-5:].tolist() == list(range(n_latents - 5, n_latents))
    token = torch.arange(n, device=device).repeat_interleave(found.offsets.diff())
    assert torch.equal(found.acts, rows[token, found.idx.long()].float())
    above = (rows[-8:] > found.acts.min()).sum(dim=1)
    assert (found.offsets.diff()[-8:] >= above).all()


def jump_inputs(shape, device, dtype=torch.float32) -> dict:
    n, n_latents, chunk = shape
    rows = random(n, n_latents)
    threshold = torch.linspace(0, 2.5, n_latents)
    rows[-1, ::3] = threshold[::3]  # exactly at the threshold: near, and does not fire
    rows[-1, 1::3] = threshold[1::3] - 0.25  # at the edge of the window: neither
    pre, maxima = as_encoded(rows.to(device, dtype), chunk)
    return {"pre": pre, "maxima": maxima, "threshold": threshold.to(device), "bandwidth": 0.5}


def jumped(op, args, dtype, capacity=1000, cuts=()):
    n, n_latents = len(args["pre"]), len(args["threshold"])
    entries = new_entries(n, capacity, n_latents, args["pre"].device)
    bounds = [0, *cuts, n]
    for first, last in pairwise(bounds):
        part = {"pre": args["pre"][first:last], "maxima": args["maxima"][first:last]}
        op(**args | part, entries=entries, first=first)
    return dict(vars(entries))


def check_jump(args, **settings) -> dict:
    found, wanted = jumped(jump, args, None, **settings), jumped(reference.jump, args, None, **settings)
    for name, one in wanted.items():
        assert torch.equal(found[name], one), name
    return found


JUMPS = [(1, 1, 32), (3, 40, 32), (3, 203, 64)]


@DTYPES
@pytest.mark.parametrize("shape", JUMPS, ids=str)
def test_jump_matches_reference(shape, dtype, device, poison, few_at_once):
    found = check_jump(jump_inputs(shape, device, dtype))
    used = int(found["offsets"][-1])
    assert (found["idx"][used:] == shape[1]).all() and (found["acts"][used:] == 0).all()


def test_jump_adds_the_tokens_of_a_slice_behind_those_before(device, poison):
    check_jump(jump_inputs((5, 70, 32), device), cuts=(2, 3))


@pytest.mark.parametrize("capacity", [1, 20, 61])
def test_what_there_is_no_room_for_is_lost_at_the_end(capacity, device, poison):
    found = check_jump(jump_inputs((3, 70, 32), device), capacity=capacity, cuts=(1,))
    assert found["offsets"][-1] == capacity and found["active"].sum() > capacity


def test_what_is_near_without_firing_has_act_0(device, poison):
    args = jump_inputs((2, 10, 32), device)
    args["threshold"][:] = 0.1
    args["pre"][:, :10], args["maxima"][:] = -0.1, -0.1  # the window reaches below 0
    found = check_jump(args)
    assert found["offsets"].tolist() == [0, 10, 20] and (found["active"] == 0).all()
    assert (found["acts"] == 0).all() and (found["near"][:20] == 2).all() and (found["near"][20:] == 0).all()


def test_no_latent_fires(device, poison):
    args = jump_inputs((2, 70, 32), device)
    args["threshold"] += 100
    assert check_jump(args)["offsets"].tolist() == [0, 0, 0]


@gpu
@DTYPES
@pytest.mark.parametrize("shape", [(512, 4096, 64), (5000, 100, 32), (8, 1000003, 64)], ids=str)
def test_jump_of_many_matches_reference(shape, dtype, device, poison):
    args = jump_inputs(shape, device, dtype)
    args["threshold"] += 1
    check_jump(args, capacity=shape[0] * shape[1] // 8 + 1000)


def test_repeats_bit_for_bit(device):
    rows = random(3, 203).to(device)
    first, second = (batch_topk(*as_encoded(rows, 32), 203, 2) for _ in range(2))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("acts", "idx", "offsets"))


def test_refuses_what_the_contract_excludes(device):
    pre, maxima = as_encoded(random(3, 70).to(device), 32)
    with pytest.raises(ValueError, match="pre must be"):
        batch_topk(pre, maxima[:2], 70, 2)
    with pytest.raises(ValueError, match="pre must be fp32 or bf16"):
        batch_topk(pre.half(), maxima.half(), 70, 2)
    args = jump_inputs((3, 70, 32), device)
    entries = new_entries(3, 50, 70, device)
    with pytest.raises(ValueError, match=r"threshold must be fp32 \[n_latents\], got torch.float64"):
        jump(**args | {"threshold": args["threshold"].double()}, entries=entries)
    with pytest.raises(ValueError, match="entries must be new_entries of at least 4 tokens, got 3"):
        jump(**args, entries=entries, first=1)
    with pytest.raises(ValueError, match="entries must be new_entries"):
        jump(**args, entries=new_entries(3, 50, 70, device, jumping=False))
    with pytest.raises(ValueError, match="pre must be"):
        jump(**args | {"maxima": args["maxima"][:2]}, entries=entries)
