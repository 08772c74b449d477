from itertools import pairwise

import pytest
import torch
from sae_kernels import reference
from sae_kernels.decode_error import columns_for, decode_error, group_sums

gpu = pytest.mark.gpu
SHAPES = [(1, 1, 1, 16), (4, 3, 20, 48), (2, 9, 70, 272)]  # n, k on average, n_latents, d
LARGE = [(512, 32, 4096, 768), (256, 64, 1000003, 2304), (64, 33, 4096, 80)]
PREFIXES = {"whole": [], "two": [0.4], "five": [0.05, 0.1, 0.5, 0.5]}  # of the latents; one prefix twice


def inputs(n, k, n_latents, d, device, dtype=torch.float32, prefixes=(), ragged=True):
    g = torch.Generator(device).manual_seed(0)
    lengths = torch.full((n,), k)
    if ragged and n > 1:
        lengths[0], lengths[1] = 0, min(2 * k, n_latents)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    capacity = int(offsets[-1]) + 3  # and room for more
    idx = torch.full((capacity,), n_latents, dtype=torch.int32)
    idx[:-3] = torch.cat([torch.randperm(n_latents)[:m].sort().values for m in lengths.tolist()]).int()
    acts = torch.rand(capacity, generator=g, device=device)
    acts[::4] = 0
    w, x, b = (torch.randn(*s, generator=g, device=device) for s in ((n_latents, d), (n, d), (d,)))
    sizes = [max(1, int(share * n_latents)) for share in prefixes] + [n_latents]
    return {
        "acts": acts,
        "idx": idx.to(device),
        "offsets": offsets.to(device),
        "w_dec": w.to(dtype),
        "inverse_norm": 1 / w.norm(dim=1),
        "x": x.to(dtype),
        "b_dec": b,
        "scale": 0.3,
        "prefixes": torch.tensor(sizes, dtype=torch.int32, device=device) if prefixes else None,
    }


def run(op, args, dtype, **settings):
    """What is of several blocks of columns, added up. Beyond the last entry nothing is to be written."""
    (n, d), capacity, device = args["x"].shape, len(args["acts"]), args["x"].device
    wide = torch.promote_types(dtype, torch.float32)
    blocks = -(-d // settings.get("columns", columns_for(d)))
    planes = 1 if args["prefixes"] is None else len(args["prefixes"])
    pull = torch.full((planes, n, d), torch.nan, dtype=dtype, device=device)
    token = torch.full((capacity,), -1, dtype=torch.int32, device=device)
    d_acts = torch.full((blocks, capacity), torch.nan, dtype=wide, device=device)
    squares, whole = torch.full((2, blocks, n), torch.nan, dtype=wide, device=device)
    op(**args, pull=pull, token=token, d_acts=d_acts, squares=squares, whole=whole, **settings)
    parts = {"d_acts": d_acts.sum(dim=0), "squares": squares.sum(dim=0), "whole": whole.sum(dim=0)}
    return {"pull": pull, "token": token, **parts}


@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, prefixes, device, poison, agrees):
    agrees(
        run, decode_error, reference.decode_error, inputs(*shape, device, prefixes=prefixes), torch.float32
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_bf16_matches_reference(shape, prefixes, device, poison, agrees):
    args = inputs(*shape, device, torch.bfloat16, prefixes)
    agrees(run, decode_error, reference.decode_error, args, torch.bfloat16)


def of_two_ranks(args):
    """The arguments of each of two ranks: its latents, the entries that are theirs, its prefixes."""
    n_latents, offsets = len(args["w_dec"]), args["offsets"].tolist()
    half, ranks = n_latents // 2, []
    for first, stop in ((0, half), (half, n_latents)):
        own = (first <= args["idx"]) & (args["idx"] < stop)
        counts = [int(own[a:b].sum()) for a, b in pairwise(offsets)]
        prefixes = None if args["prefixes"] is None else (args["prefixes"] - first).clamp(min=0)
        rank = {"acts": args["acts"][own], "idx": args["idx"][own] - first, "prefixes": prefixes}
        rank["offsets"] = torch.tensor([0, *counts], device=own.device).cumsum(0).int()
        ranks.append(args | rank | {name: args[name][first:stop] for name in ("w_dec", "inverse_norm")})
    return ranks


def run_sums(op, args, dtype, **settings):
    n, d, planes = len(args["offsets"]) - 1, args["w_dec"].shape[1], 1
    if args["prefixes"] is not None:
        planes = len(args["prefixes"])
    wide = torch.promote_types(dtype, torch.float32)
    sums = torch.full((planes, n, d), torch.nan, dtype=wide, device=args["x"].device)
    given = {name: args[name] for name in ("acts", "idx", "offsets", "w_dec", "inverse_norm", "prefixes")}
    op(**given, sums=sums, **settings)
    return {"sums": sums}


@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_match_reference(shape, prefixes, device, poison, agrees):
    args = inputs(*shape, device, prefixes=prefixes)
    agrees(run_sums, group_sums, reference.group_sums, args, torch.float32)


@gpu
@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES.keys())
def test_bf16_sums_match_reference(prefixes, device, poison, agrees):
    args = inputs(*LARGE[0], device, torch.bfloat16, prefixes)
    agrees(run_sums, group_sums, reference.group_sums, args, torch.bfloat16)


@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES.keys())
def test_what_two_ranks_rebuild_is_what_one_does(prefixes, device, poison, agrees):
    args = inputs(*SHAPES[1], device, prefixes=prefixes)
    ranks = of_two_ranks(args)
    sums = sum(run_sums(group_sums, rank, torch.float32)["sums"] for rank in ranks)
    whole, seen = run(decode_error, args, torch.float32), []
    for rank in ranks:
        agrees(run, decode_error, reference.decode_error, rank | {"sums": sums}, torch.float32)
        seen.append(run(decode_error, rank | {"sums": sums}, torch.float32))
        for name in ("pull", "squares", "whole"):
            torch.testing.assert_close(seen[-1][name], whole[name])
            assert torch.equal(seen[-1][name], seen[0][name])
    for name in ("d_acts", "token"):
        first, second = ((one[name], rank["offsets"].tolist()) for one, rank in zip(seen, ranks, strict=True))
        offsets = args["offsets"].tolist()
        for i, (start, stop) in enumerate(pairwise(offsets)):
            parts = [x[at[i] : at[i + 1]] for x, at in (first, second)]
            torch.testing.assert_close(torch.cat(parts), whole[name][start:stop])


def test_blocks_of_columns_make_no_difference(device, poison):
    args = inputs(2, 3, 20, 80, device, prefixes=[0.4])
    whole, parts = run(decode_error, args, torch.float32), run(decode_error, args, torch.float32, columns=32)
    assert torch.equal(whole["pull"], parts["pull"]) and torch.equal(whole["token"], parts["token"])
    for name in ("d_acts", "squares", "whole"):
        torch.testing.assert_close(whole[name], parts[name], equal_nan=True)


def test_repeats_bit_for_bit(device):
    args = inputs(*SHAPES[1], device, prefixes=[0.4])
    first, second = run(decode_error, args, torch.float32), run(decode_error, args, torch.float32)
    assert all(torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first)


def test_a_token_without_entries_is_rebuilt_as_b_dec(device, poison):
    args = inputs(3, 2, 20, 16, device)
    found = run(decode_error, args, torch.float32)
    assert torch.equal(found["pull"][0, 0], args["b_dec"] - args["x"][0])


def test_one_prefix_is_the_whole(device, poison):
    args = inputs(*SHAPES[1], device)
    plain = run(decode_error, args, torch.float32)
    nested = run(decode_error, args | {"prefixes": torch.tensor([20], dtype=torch.int32, device=device)}, torch.float32)
    for name in plain:
        torch.testing.assert_close(plain[name], nested[name], equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_nan_and_infinity_reach_the_loss(device):
    args = inputs(*SHAPES[1], device)
    args["x"][2, 5], args["x"][3, 7] = torch.nan, torch.inf
    squares = run(decode_error, args, torch.float32)["squares"]
    assert squares[:2].isfinite().all() and squares[2].isnan() and not squares[3].isfinite()


def test_refuses_what_the_contract_excludes(device):
    args = inputs(4, 3, 20, 48, device)
    for bad in ({"w_dec": args["w_dec"].double()}, {"w_dec": args["w_dec"][:, :32]}):
        with pytest.raises(ValueError, match=r"w_dec and pull must be torch.float32 \[n_latents, 48\]"):
            run(decode_error, args | bad, torch.float32)
    with pytest.raises(ValueError, match="w_dec and pull must be"):
        run(decode_error, args, torch.float64)
    for name in ("idx", "offsets"):
        with pytest.raises(ValueError, match="idx, offsets and token must be int32"):
            run(decode_error, args | {name: args[name].long()}, torch.float32)
        with pytest.raises(ValueError, match="idx and offsets must be int32"):
            run_sums(group_sums, args | {name: args[name].long()}, torch.float32)
    with pytest.raises(ValueError, match=r"sums must be fp32 \[1, 4, 48\], got torch.float64"):
        run_sums(group_sums, args, torch.float64)
    with pytest.raises(ValueError, match=r"sums must be fp32 \[1, 4, 48\] like pull, got"):
        run(decode_error, args | {"sums": args["x"]}, torch.float32)
    outs = {"pull": torch.empty(1, 4, 48, device=device), "token": torch.empty_like(args["idx"])}
    good = {"d_acts": args["acts"][None], "squares": args["acts"][None, :4], "whole": args["acts"][None, :4]}
    for bad in (
        {"d_acts": args["acts"]},
        {"squares": args["acts"][:4]},
        {"whole": args["acts"][None, :3]},
        {"columns": 32},
    ):
        with pytest.raises(ValueError, match="must be of . blocks of columns"):
            decode_error(**args, **outs, **{**good, **bad})
