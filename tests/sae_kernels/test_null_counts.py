import pytest
import torch
from sae_kernels import ops, reference
from sae_kernels.null_counts import COLUMNS, GROUP, null_counts
from sae_kernels.values import CELLS

gpu = pytest.mark.gpu
SHAPES = [(1, 1, 1, 1.0), (3, 5, 7, 0.5), (GROUP + 3, 20, 33, 0.2), (9, 40, COLUMNS + 5, 0.3)]  # latents, m, n, density
LARGE = [(5000, 3000, 1000, 0.02), (300, 20000, 2100, 0.3)]
BOTH = pytest.mark.parametrize("op", [null_counts, ops.null_counts], ids=["triton", "ops"])


def inputs(n_latents, m, n, density, device, *, real=False, size=50):
    """Latents of which one is silent, labels that fill up to a width, and bars in the middle of the statistics."""
    torch.manual_seed(0)
    dense = torch.randint(-size, size + 1, (n_latents, m)) * (torch.rand(n_latents, m) < density)
    dense[n_latents // 2] = 0 if n_latents > 1 else 3
    latent, row = dense.nonzero(as_tuple=True)
    value = dense[latent, row]
    labels = torch.full((m, -(-n // 16) * 16), 99)
    labels[:, :n] = torch.rand(m, n) < 0.4
    if real:
        value, labels = value / 7, labels + torch.rand(labels.shape)
    offsets = torch.searchsorted(latent, torch.arange(n_latents + 1))
    args = {"value": value.float() if real else value.int(), "row": row, "offsets": offsets}
    args |= {"labels": labels.float() if real else labels.to(torch.int8)}
    scale = torch.rand(n_latents).double() + 0.5
    scale[n_latents // 2] = 0 if n_latents > 1 else 1
    args |= {"scale": scale / size, "shift": torch.randn(n_latents).double(), "bar": torch.rand(n_latents).double() * 2}
    return {name: x.to(device) for name, x in args.items()} | {"n": n}


def same(got, wanted, exact=True):
    assert torch.equal(got.at_least, wanted.at_least) and torch.equal(got.histogram, wanted.histogram)
    torch.testing.assert_close(got.maxima, wanted.maxima, rtol=1e-13 if exact else 1e-5, atol=1e-12 if exact else 1e-5)


@BOTH
@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_match_reference(op, shape, two_sided, device, poison):
    args = inputs(*shape, device)
    wanted = reference.null_counts(**args, two_sided=two_sided)
    same(op(**args, two_sided=two_sided), wanted)
    if shape[0] > 1:
        assert wanted.histogram.sum() == (shape[0] - 1) * shape[2], "the silent latent is not in it"


@gpu
@BOTH
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_whole_numbers_match_reference_at_size(op, shape, device, poison):
    args = inputs(*shape, device, size=shape[1])
    same(op(**args, two_sided=True), reference.null_counts(**args, two_sided=True))


@BOTH
@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=gpu) for s in LARGE)], ids=str)
def test_real_numbers_match_reference_to_fp32(op, shape, device, poison):
    """Counts lie between those of bars a little above and a little below."""
    args = inputs(*shape, device, real=True)
    got = op(**args, two_sided=True)
    margin = 1e-6 * shape[1]
    above, below = (reference.null_counts(**args | {"bar": args["bar"] + d}, two_sided=True) for d in (margin, -margin))
    assert (above.at_least <= got.at_least).all() and (got.at_least <= below.at_least).all()
    torch.testing.assert_close(got.maxima, above.maxima, rtol=1e-5, atol=margin)
    assert got.histogram.sum() == above.histogram.sum()
    moved = (got.histogram.cumsum(0) - above.histogram.cumsum(0)).abs().max()
    assert moved <= max(2, 0.001 * above.histogram.sum()), moved


@BOTH
def test_sums_beyond_32_bits(op, device, poison):
    args = inputs(3, 300, 20, 1.0, device, size=2**30)
    args["value"] |= 1
    args["scale"] = torch.full_like(args["scale"], 2.0**-34)
    wanted = reference.null_counts(**args, two_sided=True)
    assert wanted.maxima.max() > 2.0**-3, "sums above 2^31"
    same(op(**args, two_sided=True, wide=True), wanted)


@BOTH
def test_equal_reaches_the_bar(op, device, poison):
    """One entry of 3, labels 0 and 1: s is 0 or 3 / 2."""
    one = torch.ones(1, dtype=torch.float64, device=device)
    labels = torch.tensor([[0, 1, 1] + [0] * 13], dtype=torch.int8, device=device)
    entry = torch.tensor([3], dtype=torch.int32, device=device), torch.tensor([0], device=device)
    got = op(*entry, torch.tensor([0, 1], device=device), labels, one / 2, 0 * one, 1.5 * one, n=3, two_sided=True)
    assert got.at_least.tolist() == [2] and got.maxima.tolist() == [0, 1.5, 1.5]
    assert got.histogram.nonzero().flatten().tolist() == [0, int(reference.cells(torch.tensor(1.5)))]


def test_cells_rise_with_the_statistic_and_are_narrow():
    s = torch.logspace(-7, 12, 5000, base=2, dtype=torch.float64)
    cell = reference.cells(s)
    assert (cell.diff() >= 0).all() and cell[0] == 0 and cell[-1] == CELLS - 1
    inside = (s > 2**-5) & (s < 2**11)
    assert (reference.cells(s[inside] * (1 + 2 / 2048)) > cell[inside]).all()
    assert reference.cells(torch.tensor([-3.0, 0.0])).tolist() == [0, 0]


def test_refuses_what_the_contract_excludes(device):
    args = inputs(3, 5, 7, 0.5, device)
    for bad, sentence in (
        ({"labels": args["labels"].float()}, "must be int32 and int8 or both fp32"),
        ({"row": args["row"].int()}, "row and offsets must be int64"),
        ({"bar": args["bar"].float()}, r"must be fp64 \[3\]"),
        ({"n": 17}, "a multiple of 16 from n = 17"),
        ({"labels": args["labels"][:, :7]}, "a multiple of 16"),
        ({"bar": args["bar"].repeat(2)[::2]}, "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=sentence):
            null_counts(**args | bad, two_sided=True)
