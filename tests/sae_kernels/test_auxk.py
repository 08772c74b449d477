import pytest
import torch
from sae_kernels import reference
from sae_kernels.auxk import MAX_DEAD, keep_auxk, prune_auxk, row_dots, scaled_rows

gpu = pytest.mark.gpu
FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(1, 1, 1, 1), (3, 40, 9, 4), (3, 40, 9, 20), (2, 200, 128, 50)]  # n, n_latents, m, k_aux
LARGE = [(64, 4096, 1000, 384), (64, 70001, MAX_DEAD, 1152), (64, 4096, 128, 384)]


def inputs(n, n_latents, m, k_aux, device, dtype=FP32):
    torch.manual_seed(0)
    pre = torch.full((n, -(-n_latents // 32) * 32), torch.nan)  # columns that are no latents
    pre[:, :n_latents] = torch.randn(n, n_latents)
    pre[0] = (2 * pre[0]).round()
    dead = torch.full((m,), n_latents)
    found = torch.randperm(n_latents)[: max(1, m - 3)].sort().values  # and places that are none
    dead[: len(found)] = found
    return {"pre": pre.to(device, dtype), "dead": dead.int().to(device), "n_latents": n_latents, "k_aux": k_aux}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keeps_what_reference_keeps(shape, device, poison):
    args = inputs(*shape, device)
    assert torch.equal(keep_auxk(**args), reference.keep_auxk(**args))


@gpu
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_keeps_of_many_what_reference_keeps(shape, dtype, device, poison):
    args = inputs(*shape, device, dtype)
    assert torch.equal(keep_auxk(**args), reference.keep_auxk(**args))


def of_ranks(ranks, n, m, device, dtype=FP32):
    """What ranks keep, with zeros and ties."""
    g = torch.Generator().manual_seed(0)
    return (4 * torch.randn(ranks, n, m, generator=g)).round().relu().div(4).to(device, dtype)


@pytest.mark.parametrize(("ranks", "n", "m", "k_aux"), [(2, 3, 1, 1), (2, 3, 20, 7), (3, 2, 11, 9), (2, 2, 5, 30)])
def test_leaves_of_all_ranks_what_reference_leaves(ranks, n, m, k_aux, device):
    everyone, total = of_ranks(ranks, n, m, device), 0
    for rank in range(ranks):
        got, wanted = torch.full((2, n, m), torch.nan, device=device)
        prune_auxk(everyone, k_aux, rank, kept=got)
        reference.prune_auxk(everyone, k_aux, rank, kept=wanted)
        assert torch.equal(got, wanted)
        total += (got > 0).sum(dim=1)
    assert torch.equal(total, (everyone > 0).sum(dim=(0, 2)).clamp(max=k_aux))


@gpu
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_leaves_of_many_what_reference_leaves(dtype, device):
    everyone = of_ranks(2, 64, MAX_DEAD // 2, device, dtype)
    got, wanted = torch.empty_like(everyone)
    prune_auxk(everyone, 1152, 1, kept=got)
    reference.prune_auxk(everyone, 1152, 1, kept=wanted)
    assert torch.equal(got, wanted)


def test_prune_refuses_what_the_contract_excludes(device):
    everyone = of_ranks(2, 3, 5, device)
    for kept in (everyone[0, :, :4], everyone[0].double()):
        with pytest.raises(
            ValueError, match=r"kept must be torch.float32 \[3, 5\], of at most 32768 on all ranks, got"
        ):
            prune_auxk(everyone, 2, 0, kept=kept)
    wide = torch.zeros(2, 1, MAX_DEAD // 2 + 1, device=device)
    with pytest.raises(ValueError, match=r"of at most 32768 on all ranks, got torch.float32 \[1, 16385\] on each of 2"):
        prune_auxk(wide, 2, 0, kept=wide[0])


def test_fills_what_it_is_given(device):
    args = inputs(*SHAPES[1], device)
    kept = torch.full((3, 9), torch.nan, device=device)
    assert keep_auxk(**args, kept=kept) is kept
    assert torch.equal(kept, reference.keep_auxk(**args))


def test_of_equal_ones_the_first_and_nothing_below_0(device, poison):
    args = inputs(2, 40, 12, 4, device)
    args["pre"][0], args["pre"][1] = 1.5, -1.0
    kept = keep_auxk(**args)
    assert kept[0].tolist() == [1.5] * 4 + [0.0] * 8 and (kept[1] == 0).all()


def test_nan_shows(device, poison):
    args = inputs(2, 40, 12, 4, device)
    args["pre"][1] = torch.nan
    kept = keep_auxk(**args)
    assert kept[0].isfinite().all() and kept[1].isnan().any()


@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=gpu)])
@pytest.mark.parametrize("shape", [(1, 1, 16), (9, 4, 80), pytest.param((4096, 1024, 2304), marks=gpu)], ids=str)
def test_rows_and_dots_match_reference(shape, dtype, device, poison, agrees):
    n_latents, m, d = shape
    torch.manual_seed(0)
    w, a, b = (torch.randn(rows, d, device=device).to(dtype) for rows in (n_latents, m, m))
    dead = torch.randint(n_latents + 1, (m,), device=device).int()
    dead[-1] = n_latents
    args = {"w": w, "inverse_norm": 1 / w.float().norm(dim=1), "dead": dead}
    agrees(lambda op, args, _: {"rows": op(**args)}, scaled_rows, reference.scaled_rows, args, dtype)
    agrees(lambda op, args, _: {"dots": op(**args)}, row_dots, reference.row_dots, {"a": a, "b": b}, FP32)
    wide = {"a": a, "b": torch.stack([b, b])[0].T.contiguous().T}  # not row-major
    agrees(lambda op, args, _: {"dots": op(**args)}, row_dots, reference.row_dots, wide, FP32)


def test_refuses_what_the_contract_excludes(device):
    args = inputs(*SHAPES[1], device)
    for dead in (args["dead"].long(), torch.zeros(MAX_DEAD + 1, dtype=torch.int32, device=device)):
        with pytest.raises(ValueError, match=f"dead must be int32 of at most {MAX_DEAD}"):
            keep_auxk(**args | {"dead": dead})
    with pytest.raises(ValueError, match=r"b must be \[3, 16\] like a, got \[2, 16\]"):
        row_dots(torch.empty(3, 16, device=device), torch.empty(2, 16, device=device))
