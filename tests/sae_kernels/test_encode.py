import pytest
import torch
from sae_kernels import reference
from sae_kernels.encode import Tile, chunk_for, encode, tile_for
from sae_kernels.prepare import FP8, FP8_LARGEST
from sae_kernels.select import select

gpu = pytest.mark.gpu
FP32, BF16 = torch.float32, torch.bfloat16
SMALL = Tile(16, 64, 16, 2, flatten=False, stages=2, warps=4)  # many tiles, and groups of them cut short
HALVED = Tile(16, 128, 16, 2, flatten=False, stages=2, warps=4, halves=True)
CASES = {  # n, d, n_latents, chunk, tile
    "one of each": (1, 16, 1, 32, None),
    "latents that fill no chunk": (3, 20, 33, 32, None),
    "whole chunks": (5, 48, 128, 64, None),
    "odd multiple of 16": (70, 80, 203, 64, None),
    "tiles": (70, 40, 203, 32, SMALL),
    "halves": (40, 40, 203, 64, HALVED),
}
LARGE = [(512, 768, 4096, 64), (300, 720, 4096 + 97, 32), (64, 64, 1000003, 64)]


def rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def inputs(n, d, n_latents, chunk, device, dtype=FP32, tile=None):
    g = torch.Generator(device).manual_seed(0)
    x, w, b = (torch.randn(*s, generator=g, device=device) for s in ((n, d), (n_latents, d), (n_latents,)))
    return {"x": x.to(dtype), "w": w.to(dtype), "b": b, "chunk": chunk, "tile": tile}


def run(op, args, dtype):
    args = dict(args)
    chunk, n = args.pop("chunk"), len(args["x"])
    padded = rounded_up(len(args["w"]), chunk)
    pre, maxima = (
        torch.full((n, width), torch.nan, dtype=dtype, device=args["x"].device) for width in (padded, padded // chunk)
    )
    op(**args, pre=pre, maxima=maxima)
    return {"pre": pre, "maxima": maxima}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_reference(case, device, agrees):
    n, d, n_latents, chunk, tile = case
    args = inputs(n, d, n_latents, chunk, device, tile=tile)
    agrees(run, encode, reference.encode, args, FP32)
    found = run(encode, args, FP32)
    assert (found["pre"][:, n_latents:] == -torch.inf).all()
    chunks = found["pre"].view(n, -1, chunk)
    assert torch.equal(found["maxima"], chunks.amax(dim=2))


def test_pre_activations_below_0_and_equal_ones_have_their_maximum(device):
    args = inputs(3, 16, 40, 32, device)
    args["w"].zero_()
    args["b"].fill_(-2.0)
    found = run(encode, args, FP32)
    assert (found["pre"][:, :40] == -2).all() and (found["maxima"] == -2).all()


@gpu
@pytest.mark.parametrize("shape", [*LARGE, (3, 24, 33, 32), (1, 16, 1, 32)], ids=str)
def test_bf16_matches_reference(shape, device, agrees):
    agrees(run, encode, reference.encode, inputs(*shape, device, BF16), BF16)


@gpu
@pytest.mark.parametrize("tile", [tile_for(2**16, 768, BF16, 0), tile_for(2**10, 768, BF16, 0)], ids=str)
def test_both_tiles_of_bf16(tile, device, agrees):
    agrees(run, encode, reference.encode, inputs(300, 720, 1000, 32, device, BF16, tile), BF16)


@gpu
@pytest.mark.parametrize("side", [0, 32, 64])
@pytest.mark.parametrize("shape", [*LARGE[:2], (3, 80, 33, 32)], ids=str)
def test_e4m3_matches_reference(shape, side, device, agrees):
    args = inputs(*shape, device, BF16)
    args["x"][:, :side] *= 50
    scales = {}
    for name in ("x", "w"):
        rest = args[name].float()
        rest[:, :side] = 0
        scales[name] = rest.abs().amax(dim=1).clamp(min=1e-30) / FP8_LARGEST
        args[name + "_side"] = args[name] if side else None
        args[name + "_scale"] = scales[name]
        args[name] = (rest / scales[name][:, None]).to(FP8)
    agrees(run, encode, reference.encode, args | {"side": side}, BF16)


@gpu
def test_offsets_beyond_2_to_the_31(device):
    """Of pre [33000, 65536], the first and the last tokens."""
    args = inputs(33000, 16, 65536, 64, device, BF16)
    found = run(encode, args, BF16)
    assert found["pre"].numel() > 2**31
    acts, idx = select(found["pre"], found["maxima"], 65536, 8)
    for rows in (slice(0, 8), slice(-8, None)):
        wanted = run(reference.encode, args | {"x": args["x"][rows]}, BF16)
        for name in ("pre", "maxima"):
            torch.testing.assert_close(found[name][rows], wanted[name])
        here = found["pre"][rows], found["maxima"][rows]
        for got, want in zip((acts, idx), reference.select(*here, 65536, 8), strict=True):
            assert torch.equal(got[rows], want)


@gpu
def test_repeats_bit_for_bit(device):
    args = inputs(*LARGE[0], device, BF16)
    first, second = run(encode, args, BF16), run(encode, args, BF16)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_chunk_leaves_few_values_to_look_at():
    for n_latents, k in ((4096, 32), (65536, 32), (131072, 32), (1000003, 64)):
        looked_at = {chunk: n_latents / chunk + k * chunk for chunk in (32, 64)}
        assert looked_at[chunk_for(n_latents, k)] == min(looked_at.values())


def test_refuses_what_the_contract_excludes(device):
    args = inputs(3, 16, 40, 32, device)
    for w in (args["w"].double(), args["w"][:, :12]):
        with pytest.raises(ValueError, match=r"w must be torch.float32 \[n_latents, 16\] like x"):
            run(encode, args | {"w": w}, FP32)
    with pytest.raises(ValueError, match="w must be torch.float64"):
        run(encode, args | {"x": args["x"].double(), "w": args["w"].double()}, FP32)
    with pytest.raises(ValueError, match="rows must be a multiple of 16 bytes, got 15"):
        run(encode, args | {"x": args["x"][:, :15].contiguous(), "w": args["w"][:, :15].contiguous()}, FP32)
    with pytest.raises(ValueError, match="of 32 or 64 columns of pre, got 16"):
        run(encode, args | {"chunk": 16}, FP32)
    del args["chunk"]
    room = torch.empty(3, 64, device=device)
    for pre, maxima in ((room[:2], room[:, :2]), (room[:, :32], room[:, :1]), (room, room[:2, :2])):
        with pytest.raises(ValueError, match=r"pre and maxima must be \[3, 40 in whole chunks\]"):
            encode(**args, pre=pre, maxima=maxima)
