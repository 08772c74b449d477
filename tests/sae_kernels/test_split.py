"""Two 16-bit halves of fp32, to the last bit."""

import pytest
import torch
from sae_kernels import reference
from sae_kernels.split import ROWS, join, split

HALFWAY = [1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 - 2**-23, 1 + 2**-8 + 2**-23, 2 - 2**-9]
EDGES = [0.0, -0.0, 1e-40, -1e-45, 2.0**-126, 3e38, -3e38, 1 - 2**-24, *HALFWAY]


def values(shape: tuple[int, int]) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w.view(-1)[: len(EDGES)] = torch.tensor(EDGES)[: w.numel()]
    return w


@pytest.mark.parametrize("shape", [(1, 1), (7, 48), (2 * ROWS + 3, 3)], ids=str)
def test_matches_reference_and_joins_to_the_same_bits(shape, device):
    w = values(shape).to(device)
    high, low = split(w)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    for got, wanted in zip((high, low), reference.split(w), strict=True):
        assert torch.equal(got.view(torch.int16), wanted.view(torch.int16))
    for joined in (join(high, low), reference.join(high, low)):
        assert torch.equal(joined.view(torch.int32), w.view(torch.int32))


def test_the_upper_half_is_the_nearest_bf16_and_halves_go_away_from_zero():
    high, _ = split(torch.tensor([HALFWAY]))
    assert high.tolist() == [[1 + 2**-7, -1 - 2**-7, 1 + 2**-6, 1.0, 1 + 2**-7, 2.0]]


def test_columns_as_rows():
    w = values((40, 9)).T
    assert torch.equal(join(*split(w)), w)
