"""The search of the k-th largest, alone."""

import pytest
import torch
import triton
import triton.language as tl
from sae_kernels.keys import among_largest, kth_largest, ordered, places

SIZE = 64
INF = float("inf")


@triton.jit
def _kernel(x_ptr, key_ptr, level_ptr, chosen_ptr, place_ptr, k, SHIFT: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    key = ordered(tl.load(x_ptr + i), SHIFT)
    level = kth_largest(key, k, tl.min(key), tl.max(key))
    chosen = among_largest(key, k, level)
    tl.store(key_ptr + i, key)
    tl.store(level_ptr, level)
    tl.store(chosen_ptr + i, chosen.to(tl.int32))
    tl.store(place_ptr + i, places(chosen))


def searched(x, k, shift=0):
    key, chosen, place = torch.full((3, SIZE), -1, dtype=torch.int32, device=x.device)
    level = torch.full((1,), -1, dtype=torch.int32, device=x.device)
    _kernel[(1,)](x, key, level, chosen, place, k, SHIFT=shift, SIZE=SIZE)
    return key, int(level), chosen.bool(), place


def rows():
    torch.manual_seed(0)
    wide = torch.randn(SIZE) * 10.0 ** torch.randint(-30, 30, (SIZE,))
    wide[3], wide[4], wide[5] = -INF, INF, 0.0
    near = 1 + torch.arange(SIZE).flip(0) * 2.0**-23
    return {
        "wide": wide,
        "near": near,
        "below 0": -near,
        "ties": torch.randint(3, (SIZE,)).float(),
        "equal": torch.full((SIZE,), -2.0),
    }


@pytest.mark.parametrize("name", rows())
@pytest.mark.parametrize("k", [1, 20, SIZE])
def test_finds_the_kth_largest_and_of_equal_ones_the_first(name, k, device):
    x = rows()[name]
    key, level, chosen, place = (t.cpu() if torch.is_tensor(t) else t for t in searched(x.to(device), k))
    best = x.sort(descending=True, stable=True).indices[:k]
    assert torch.equal(key.argsort(descending=True, stable=True)[:k], best)
    assert level == key[best[-1]]
    assert chosen.sum() == k and chosen[best].all()
    assert place[chosen].tolist() == list(range(k))


def test_nan_is_above_everything_and_minus_0_below_0(device):
    x = torch.zeros(SIZE, device=device)
    x[7], x[8], x[9] = INF, torch.nan, -0.0
    key = searched(x, 1)[0]
    assert key.argmax() == 8 and key.argmin() == 9


def test_neighbours_of_bf16_are_1_apart(device):
    x = (1 + torch.arange(SIZE, device=device) / 128) * -1.0
    assert (searched(x, 1, shift=16)[0].diff() == -1).all()
