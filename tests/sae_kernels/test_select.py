import pytest
import torch
from sae_kernels import reference
from sae_kernels.select import MAX_CANDIDATES, select

gpu = pytest.mark.gpu
BF16 = pytest.param(torch.bfloat16, marks=gpu)
SHAPES = [(1, 1, 1), (5, 5, 32), (33, 4, 32), (203, 5, 32), (203, 3, 64), (256, 1, 64)]  # n_latents, k, chunk
LARGE = [(4096, 32, 64), (4193, 32, 32), (1000003, 64, 64), (24576, 100, 32), (65536, 256, 64)]


def as_encoded(rows: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """pre and maxima of rows [n, n_latents], as `encode` leaves them."""
    n, n_latents = rows.shape
    padded = -(-n_latents // chunk) * chunk
    maxima = torch.nn.functional.pad(rows, (0, padded - n_latents), value=-torch.inf).view(n, -1, chunk).amax(dim=2)
    return torch.nn.functional.pad(rows, (0, padded - n_latents), value=torch.nan), maxima


def check(rows: torch.Tensor, k: int, chunk: int) -> None:
    pre, maxima = as_encoded(rows, chunk)
    wanted = reference.select(pre, maxima, rows.shape[1], k)
    for got, want in zip(select(pre, maxima, rows.shape[1], k), wanted, strict=True):
        assert torch.equal(got, want), f"{got} in place of {want}"


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("n_latents", "k", "chunk"), SHAPES)
def test_matches_reference(n_latents, k, chunk, dtype, device, poison):
    torch.manual_seed(0)
    rows = torch.randn(3, n_latents)
    rows[1] -= 10  # all of them negative
    rows[2] = (2 * rows[2]).round() + 0.0  # ties, and no -0
    check(rows.to(device, dtype), k, chunk)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_of_equal_values_the_first(dtype, device, poison):
    rows = torch.full((4, 100), -1.0)
    rows[0, 60:70] = 3.0  # more of them than k, across two chunks
    rows[1, ::9] = 2.0
    rows[1, 99] = 5.0
    rows[2] = 0.25  # all equal
    rows[3, :34] = -torch.arange(34) / 4  # the largest in the first chunk, the fourth also in the second
    rows[3, 40] = -0.75
    check(rows.to(device, dtype), 4, 32)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_large_and_tiny_values(dtype, device, poison):
    rows = torch.linspace(-1, 1, 66).repeat(3, 1)
    rows[0, 5], rows[0, 40], rows[0, 9] = torch.inf, 3e38, -torch.inf
    rows[1] = -torch.inf
    rows[1, 64] = -3e38
    rows[2] *= 1e-30
    check(rows.to(device, dtype), 3, 32)


def test_nan_is_kept_and_shows(device, poison):
    rows = torch.linspace(-1, 1, 66).repeat(2, 1)
    rows[0] = torch.nan
    pre, maxima = as_encoded(rows.to(device), 32)
    acts, idx = select(pre, maxima, 66, 3)
    assert acts[0].isnan().all() and acts[1].isfinite().all()
    assert len(set(idx[0].tolist())) == 3 and idx[1].tolist() == [63, 64, 65]


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_latents", "k", "chunk"), LARGE)
def test_large_rows_match_reference(n_latents, k, chunk, dtype, device, poison):
    torch.manual_seed(0)
    check(torch.randn(64, n_latents, device=device).to(dtype), k, chunk)


def test_refuses_what_the_contract_excludes(device):
    pre, maxima = as_encoded(torch.randn(2, 300, device=device), 32)
    for k in (0, 301):
        with pytest.raises(ValueError, match=f"k must be between 1 and n_latents = 300, got {k}"):
            select(pre, maxima, 300, k)
    with pytest.raises(ValueError, match=f"k must be at most {MAX_CANDIDATES // 32}, got 513"):
        select(torch.randn(2, 600 * 32, device=device), torch.randn(2, 600, device=device), 600 * 32, 513)
    for bad in (maxima.half(), maxima[:1], maxima[:, :7], maxima[:, :1].repeat(1, 200)):
        with pytest.raises(ValueError, match=r"pre must be \[.*\] like its maxima"):
            select(pre, bad, 300, 4)
    with pytest.raises(ValueError, match="pre must be fp32 or bf16, got torch.float16"):
        select(pre.half(), maxima.half(), 300, 4)
