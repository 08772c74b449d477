"""Adam and the rounding of its moments, alone in a kernel."""

import pytest
import torch
import triton
import triton.language as tl
from sae_kernels import reference, values
from sae_kernels.adam import adam, stochastic_bits, store_moment
from sae_kernels.scalars import new_scalars

SIZE = 4096


@triton.jit
def _adam_kernel(w_ptr, m_ptr, v_ptr, g_ptr, scalars_ptr, faster, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    w, m, v = tl.load(w_ptr + i), tl.load(m_ptr + i), tl.load(v_ptr + i)
    w, m, v = adam(w, m, v, tl.load(g_ptr + i), scalars_ptr, faster)
    tl.store(w_ptr + i, w)
    tl.store(m_ptr + i, m)
    tl.store(v_ptr + i, v)


@triton.jit
def _round_kernel(x_ptr, bits_ptr, out_ptr, scalars_ptr, SIZE: tl.constexpr, SALT: tl.constexpr, ROUND: tl.constexpr):
    i = tl.arange(0, SIZE)
    bits = stochastic_bits(i, scalars_ptr, SALT)
    tl.store(bits_ptr + i, bits)
    store_moment(out_ptr + i, tl.load(x_ptr + i), bits, i < SIZE - 1, ROUND)


def scalars(device, step: int = 1, lr: float = 1e-2):
    s = new_scalars(device)
    reference.begin(s, lr, step, values.BETAS)
    return s


@pytest.mark.parametrize("faster", [1.0, 5.0])
def test_is_that_of_torch(faster, device):
    torch.manual_seed(0)
    w, m, v = torch.randn(SIZE, device=device), torch.zeros(SIZE, device=device), torch.zeros(SIZE, device=device)
    wanted = w.double().requires_grad_()
    optimiser = torch.optim.Adam([wanted], lr=faster * 1e-2)
    for step in (1, 2, 3):
        wanted.grad = 10.0 ** torch.randint(-12, 3, (SIZE,), device=device) * torch.randn(
            SIZE, dtype=torch.float64, device=device
        )
        _adam_kernel[(1,)](w, m, v, wanted.grad.float(), scalars(device, step), faster, SIZE=SIZE)
        optimiser.step()
    torch.testing.assert_close(w, wanted.detach().float())
    torch.testing.assert_close(m, optimiser.state[wanted]["exp_avg"].float())
    torch.testing.assert_close(v, optimiser.state[wanted]["exp_avg_sq"].float())


def rounded(x, step, salt=0, dtype=torch.bfloat16):
    bits, out = torch.empty(SIZE, dtype=torch.int32, device=x.device), torch.full_like(x, -7.0, dtype=dtype)
    round = dtype == torch.bfloat16
    _round_kernel[(1,)](x, bits, out, scalars(x.device, step), SIZE=SIZE, SALT=salt, ROUND=round)
    assert out[-1] == -7, "masked"
    return bits, out.float()


def test_bits_are_random_over_elements_steps_and_salts(device):
    x = torch.zeros(SIZE, device=device)
    found = torch.stack([rounded(x, step, salt)[0] for step in (1, 2, 3) for salt in (0, 1)]).cpu()
    single = (found[..., None] >> torch.arange(32)) & 1  # 6 x 4096 x 32
    assert len(found.flatten().unique()) > 6 * SIZE - 10
    spread = 0.5 / SIZE**0.5
    assert ((single.double().mean(dim=1) - 0.5).abs() < 5 * spread).all()
    for a in range(6):
        for b in range(a):
            equal = (single[a] == single[b]).double().mean(dim=0)
            assert ((equal - 0.5).abs() < 5 * spread).all(), f"{a} and {b} go together"
    assert (((single[:, 1:] == single[:, :-1]).double().mean(dim=1) - 0.5).abs() < 5 * spread).all()
    halves = found & 0xFFFF, (found >> 16) & 0xFFFF
    assert torch.corrcoef(torch.stack([half.flatten().double() for half in halves]))[0, 1].abs() < 0.04


def test_bf16_is_one_of_both_neighbours_and_right_on_average(device):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(SIZE // 2), torch.rand(SIZE // 2) * 1e-30]).to(device)
    low = (x.view(torch.int32) & -0x10000).view(torch.float32)
    high = (low.view(torch.int32) + 0x10000).view(torch.float32)
    total, steps = torch.zeros_like(x), 64
    for step in range(1, steps + 1):
        out = rounded(x, step)[1]
        assert ((out == low) | (out == high))[:-1].all()
        total += out
    share = ((total / steps - low) / (high - low))[:-1].double()  # how often it went up
    wanted = ((x - low) / (high - low))[:-1].double()
    assert (share - wanted).abs().mean() < 0.06  # sqrt(1/6 / 64) * 0.8
    assert (share - wanted).mean().abs() < 5 * (1 / 6 / steps / SIZE) ** 0.5


def test_a_second_moment_grows_by_less_than_bf16_resolves(device):
    v = torch.ones(SIZE, device=device)
    for step in range(1, 31):
        v = rounded(v * 0.999 + 0.001 * 1.21, step)[1]
        v[-1] = v[0]
    wanted = 1 + 0.21 * (1 - 0.999**30)
    assert abs(v.mean().item() - wanted) < 5 * v.std().item() / SIZE**0.5


def test_what_bf16_holds_stays_and_fp32_is_not_rounded(device):
    x = torch.linspace(-2, 2, SIZE, device=device)
    exact = x.bfloat16().float()
    assert torch.equal(rounded(exact, 1)[1][:-1], exact[:-1])
    assert torch.equal(rounded(x, 1, dtype=torch.float32)[1][:-1], x[:-1])
