from dataclasses import replace

import pytest
import torch
from sae_kernels import reference, values
from sae_kernels import row_update as kernels
from sae_kernels.packed_lists import packed_lists
from sae_kernels.prepare import FP8
from sae_kernels.row_update import Shape, block_sums, row_update
from sae_kernels.scalars import new_scalars
from sae_kernels.split import join, split
from sae_kernels.values import BLOCK, FP8_HEADROOM, FP8_LARGEST, AuxGrads, Latents, Rows

gpu = pytest.mark.gpu
FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(1, 1, 16), (12, 7, 48), (5, 3, 80), (4, 5, 272)]  # n, n_latents, d
LARGE = [(2048, 4096, 768), (512, 1003, 2304)]


def inputs(n, n_latents, d, device, k=2, dtype=FP32, prefixes=()):
    """Latent 1 fires on every token, latent 2 never, and half of the others' entries do not fire."""
    g = torch.Generator().manual_seed(0)
    idx = torch.stack([torch.randperm(n_latents, generator=g)[: min(k, n_latents)] for _ in range(n)])
    idx[:, 0] = min(1, n_latents - 1)
    idx[idx == 2] = n_latents
    capacity = idx.numel() + 5
    idx = torch.nn.functional.pad(idx.flatten(), (0, 5), value=n_latents).int()
    token = (torch.arange(capacity) // min(k, n_latents)).int()
    acts = torch.rand(capacity, generator=g) * ((idx == 1) | (torch.rand(capacity, generator=g) < 0.5))
    d_acts = torch.randn(1, capacity, generator=g)
    near = 2.0 * (torch.rand(capacity, generator=g) < 0.5)
    lists = [t.to(device) for t in (idx, token, acts, d_acts)]
    planes = len(prefixes) or 1

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(device)

    scalars = new_scalars(device)
    reference.begin(scalars, 0.3, 2, values.BETAS)
    scalars[values.FACTOR], scalars[values.AUX], scalars[values.COUNT] = 0.25, 0.7, 0.3
    w, m, v = normal(n_latents, d), normal(n_latents, d), normal(n_latents, d).abs() + 0.1
    m, v = m.bfloat16().float(), v.bfloat16().float()
    slot = torch.full((n_latents,), -1, dtype=torch.int32)
    slot[2::4] = torch.arange(len(slot[2::4])).int()
    n_dead = max(1, len(slot[2::4]))
    one_each = [normal(n_latents) for _ in range(6)]
    one_each[2], one_each[5] = one_each[2].abs(), one_each[5].abs()
    silent = torch.arange(n_latents, device=device)
    return {
        "weight": Rows(w, None, m, v, 1 / w.norm(dim=1)),
        "lists": packed_lists(*lists, n_latents, near=near.to(device)),
        "x": normal(n, d).to(dtype),
        "pull": normal(planes, n, d).to(dtype),
        "scalars": scalars,
        "latents": Latents(*one_each[:3], silent, one_each[3] * 0.1, *one_each[4:]),
        "aux": AuxGrads(normal(n_dead, d).to(dtype), slot.to(device), normal(n_dead)),
        "prefixes": torch.tensor(prefixes, dtype=torch.int32, device=device) if prefixes else None,
    }  # fmt: skip


def run(encoder: bool, **settings):
    """All that an update changes, or the norms in place of it."""

    def updated(ops, args, dtype):
        args, norms, more = dict(args), None, dict(settings)
        weight, latents, d = args["weight"], args["latents"], args["x"].shape[1]
        if not more.pop("threshold", True):
            latents = replace(latents, threshold=None, threshold_m=None, threshold_v=None)
        if more.pop("split", False) and ops is kernels:
            weight = replace(weight, **dict(zip(("high", "low"), split(weight.high), strict=True)))
        if more.pop("norms", False):
            columns = more["shape"].columns if "shape" in more else kernels.shape_for(d).columns
            norms = torch.full((len(weight.high), -(-d // columns)), torch.nan, device=weight.high.device, dtype=dtype)
        if more.pop("aux", False):
            more["aux"] = args["aux"]
        lists, scalars, prefixes = args["lists"], args["scalars"], args["prefixes"]
        sums = ops.block_sums(lists, args["x"], args["pull"], scalars, threshold=latents.threshold, prefixes=prefixes)
        if encoder:
            ops.row_update(
                weight, lists, args["x"], scalars, sums=sums, latents=latents, norms=norms, threshold_faster=3.0, **more
            )
        else:
            pull = args["pull"] if prefixes is not None else args["pull"][0]
            ops.row_update(weight, lists, pull, scalars, sums=sums, scale=0.2, prefixes=prefixes, norms=norms, **more)
        if weight.low is not None:
            weight = replace(weight, high=join(weight.high, weight.low), low=None)
        changed = {**vars(weight), **vars(latents)} if encoder else vars(weight)
        changed = {name: one for name, one in changed.items() if one is not None}
        return changed if norms is None else changed | {"norms": norms.sum(dim=1)}

    return updated


def check(agrees, args, encoder, **settings):
    agrees(run(encoder, **settings), kernels, reference, args, FP32)


@pytest.mark.parametrize("aux", [False, True], ids=["", "aux"])
@pytest.mark.parametrize("threshold", [False, True], ids=["", "threshold"])
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_encoder_matches_reference(shape, threshold, aux, device, poison, agrees):
    args = inputs(*shape, device)
    check(agrees, args, True, threshold=threshold, aux=aux)
    check(agrees, args, True, threshold=threshold, aux=aux, norms=True)


@pytest.mark.parametrize("aux", [False, True], ids=["", "aux"])
@pytest.mark.parametrize("prefixes", [(), (1, 1, 3, 7)], ids=["", "nested"])
def test_decoder_matches_reference(prefixes, aux, device, poison, agrees):
    args = inputs(12, 7, 48, device, prefixes=prefixes)
    check(agrees, args, False, aux=aux)
    check(agrees, args, False, aux=aux, norms=True)


@pytest.mark.parametrize("encoder", [True, False], ids=["encoder", "decoder"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_one_latent_and_several_blocks_of_columns(shape, encoder, device, poison, agrees):
    check(agrees, inputs(*shape, device), encoder)
    check(agrees, inputs(*shape, device), encoder, norms=True, aux=True)


@pytest.mark.parametrize("encoder", [True, False], ids=["encoder", "decoder"])
def test_columns_in_smaller_blocks(encoder, device, poison, agrees):
    check(agrees, inputs(5, 3, 80, device), encoder, shape=Shape(32, 1, unroll=3), aux=True)


def long_list(device):
    """Latent 1 fires from entry 30 to beyond three blocks: its list holds two whole ones, and ends within others."""
    n = 3 * BLOCK + 22
    acts = torch.rand(n + 35, generator=torch.Generator().manual_seed(1)).to(device)
    idx = torch.cat([torch.zeros(30), torch.ones(n), torch.full((5,), 3.0)]).int().to(device)
    token = torch.cat([torch.arange(30), torch.arange(n), torch.zeros(5)]).int().to(device)
    d_acts, near = acts.flip(0)[None] - 0.5, (acts > 0.5).float()
    lists = packed_lists(idx, token, torch.where(acts > 0.2, acts, 0), d_acts, 3, near=near)
    assert lists.offsets.tolist() == [0, 30, n + 30, n + 30]
    return inputs(n, 3, 16, device, k=1, prefixes=(1, 3)) | {"lists": lists}


@pytest.mark.parametrize("encoder", [True, False], ids=["encoder", "decoder"])
def test_a_latent_that_fires_on_every_token(encoder, device, poison, agrees):
    check(agrees, long_list(device), encoder)


def test_who_fires_in_whole_blocks_alone_is_silent_no_longer(device):
    args = long_list(device)
    args["lists"].acts[:BLOCK] = 0
    args["lists"].acts[3 * BLOCK :] = 0
    assert run(True)(kernels, args, FP32)["silent"].tolist() == [len(args["x"]), 0, len(args["x"]) + 2]


def test_block_sums_match_reference(device, poison, agrees):
    def whole(ops, args, dtype):
        threshold = args["latents"].threshold
        names = ("lists", "x", "pull", "scalars")
        found = ops.block_sums(*(args[name] for name in names), threshold=threshold, prefixes=args["prefixes"])
        assert [list(part.shape) for part in found] == [[2, 3, 16], [2, 3, 3]]
        return {"sums": found[0][:, 1:], "extras": found[1][:, 1:]}  # the first block is two latents'

    agrees(whole, kernels, reference, long_list(device), FP32)


def test_too_few_entries_for_a_block(device):
    args = inputs(12, 7, 48, device)
    sums, extras = block_sums(args["lists"], args["x"], args["pull"], args["scalars"])
    assert sums.shape == (2, 0, 48) and extras.shape == (2, 0, 3)


@pytest.mark.parametrize("encoder", [True, False], ids=["encoder", "decoder"])
def test_a_split_weight_and_bf16_moments_move_as_fp32_to_the_last_bit(encoder, device, poison):
    plain, args = run(encoder)(kernels, inputs(12, 7, 48, device), FP32), inputs(12, 7, 48, device)
    weight = replace(args["weight"], m=args["weight"].m.bfloat16(), v=args["weight"].v.bfloat16())
    halved = run(encoder, split=True)(kernels, args | {"weight": weight}, FP32)
    for name, one in plain.items():
        if name in ("m", "v"):
            cut = (one.view(torch.int32) & -0x10000).view(FP32)
            away = (cut.view(torch.int32) + 0x10000).view(FP32)
            got = halved[name].float()
            assert ((got == cut) | (got == away)).all() and (got == cut).any() and (got == away).any()
        else:
            # a compiler may contract products and sums otherwise in the two kernels; the interpreter does not
            off = (one.double() - halved[name].double()).abs().max() if one.is_cuda else 0.0
            assert torch.equal(one, halved[name]) or 0 < off <= 4e-7 * one.abs().max(), name


@pytest.mark.parametrize("encoder", [True, False], ids=["encoder", "decoder"])
def test_factor_0_leaves_every_bit(encoder, device):
    args = inputs(5, 3, 16, device)
    args["scalars"][values.FACTOR] = 0
    args["x"][2], args["pull"][0, 3] = torch.nan, torch.inf
    before = {
        name: one.clone() for name, one in {**vars(args["weight"]), **vars(args["latents"])}.items() if one is not None
    }
    norms = torch.full((3, 1), 7.0, device=device)
    sums = block_sums(args["lists"], args["x"], args["pull"], args["scalars"])
    latents, rows = (args["latents"], args["x"]) if encoder else (None, args["pull"][0])
    row_update(args["weight"], args["lists"], rows, args["scalars"], sums=sums, latents=latents)
    row_update(args["weight"], args["lists"], rows, args["scalars"], sums=sums, latents=latents, norms=norms)
    after = {**vars(args["weight"]), **vars(args["latents"])}
    assert all(torch.equal(after[name], one) for name, one in before.items()) and (norms == 7).all()  # fmt: skip


def test_norms_change_nothing_else(device):
    for encoder in (True, False):
        args = inputs(5, 3, 16, device)
        before = {
            name: one.clone()
            for name, one in {**vars(args["weight"]), **vars(args["latents"])}.items()
            if one is not None
        }
        after = run(encoder, norms=True)(kernels, args, FP32)
        assert all(torch.equal(after[name], one) for name, one in before.items() if name in after)


def test_who_fired_is_silent_no_longer_and_nobody_else(device):
    args = inputs(12, 7, 16, device)
    lists = args["lists"]
    silent = run(True)(kernels, args, FP32)["silent"]
    for latent, count in enumerate(silent.tolist()):
        start, stop = lists.offsets[latent : latent + 2].tolist()
        fired = bool((lists.acts[start:stop] > 0).any())
        assert count == (0 if fired else latent + 12)
    assert silent[1] == 0 and silent[2] == 14


def test_rows_of_the_decoder_keep_norm_1(device):
    args = inputs(12, 7, 48, device)
    after = run(False)(kernels, args, FP32)
    norms = (after["high"] * after["inverse_norm"][:, None]).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_thresholds_stay_above_0(device):
    args = inputs(12, 7, 16, device)
    args["scalars"][values.COUNT] = -1e4
    args["latents"].threshold[:] = 1e-3
    args["latents"].threshold_m.fill_(1.0)
    assert (run(True)(kernels, args, FP32)["threshold"] == 0).all()


@pytest.mark.parametrize("encoder", [True, False], ids=["encoder", "decoder"])
def test_repeats_bit_for_bit(encoder, device):
    found = [run(encoder, split=True, aux=True)(kernels, inputs(12, 7, 48, device), FP32) for _ in range(2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@gpu
@pytest.mark.parametrize("prefixes", [(), (100, 1003)], ids=["", "nested"])
@pytest.mark.parametrize("encoder", [True, False], ids=["encoder", "decoder"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_bf16_rows_of_many_latents(shape, encoder, prefixes, device, poison, agrees):
    n, n_latents, d = shape
    prefixes = (*prefixes[:-1], n_latents) if prefixes else ()
    args = inputs(n, n_latents, d, device, k=32, dtype=BF16, prefixes=prefixes)
    check(agrees, args, encoder, split=True, aux=True)
    check(agrees, args, encoder, split=True, aux=True, norms=True)
    found = [run(encoder, split=True)(kernels, inputs(n, n_latents, d, device, k=32, dtype=BF16), FP32) for _ in "ab"]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@gpu
def test_the_e4m3_copy_is_the_new_row_over_the_scale_of_the_step_before(device):
    args = inputs(512, 1003, 768, device, k=32, dtype=BF16)
    scale = args["weight"].high.abs().amax(dim=1) / FP8_LARGEST
    fp8 = torch.zeros_like(args["weight"].high).to(FP8)
    next_scale = scale * 2
    args["weight"] = replace(args["weight"], fp8=fp8, fp8_scale=scale.clone(), fp8_next=next_scale.clone())
    found = run(True, split=True)(kernels, args, FP32)
    assert torch.equal(found["fp8_scale"], next_scale)
    torch.testing.assert_close(found["fp8_next"], found["high"].abs().amax(dim=1) * (FP8_HEADROOM / FP8_LARGEST))
    got, wanted = found["fp8"].float(), (found["high"] / next_scale[:, None]).to(FP8).float()
    assert ((got - wanted).abs() <= wanted.abs() / 8 + 2**-9).all() and (got != wanted).float().mean() < 1e-3
    again = run(True, split=True)(kernels, args | {"weight": replace(args["weight"], fp8_next=found["fp8_next"])}, FP32)
    assert again["fp8"].float().isfinite().all()


@gpu
@pytest.mark.parametrize("encoder", [True, False], ids=["encoder", "decoder"])
def test_offsets_beyond_2_to_the_31(encoder, device):
    """The last three of 1,000,003 rows of 2304, which are what nobody else's entries reach."""
    n_latents, d = 1000003, 2304
    small = inputs(12, 3, d, device, dtype=BF16)
    high = torch.zeros(n_latents, d, dtype=BF16, device=device)
    high[-3:] = small["weight"].high
    low, m, v = torch.zeros_like(high, dtype=torch.int16), torch.zeros_like(high), torch.zeros_like(high)
    m[-3:], v[-3:] = small["weight"].m, small["weight"].v
    small["weight"] = replace(small["weight"], high=high[-3:].float())
    one_each = {
        name: torch.zeros(n_latents, dtype=one.dtype, device=device) for name, one in vars(small["latents"]).items()
    }
    inverse_norm = torch.ones(n_latents, device=device)
    inverse_norm[-3:] = small["weight"].inverse_norm
    for name, one in one_each.items():
        one[-3:] = getattr(small["latents"], name)
    s = small["lists"]
    latent = torch.where(s.latent < 3, s.latent.int() + n_latents - 3, n_latents)
    offsets = torch.zeros(n_latents + 1, dtype=torch.int32, device=device)
    offsets[-4:] = s.offsets
    assert high.numel() > 2**31
    large = small | {
        "weight": Rows(high, low, m, v, inverse_norm),
        "latents": Latents(**one_each),
        "lists": replace(s, latent=latent, offsets=offsets),
    }
    found, wanted = run(encoder)(kernels, large, FP32), run(encoder)(reference, small, FP32)
    for name in ("high", "b", "threshold", "silent") if encoder else ("high", "inverse_norm"):
        torch.testing.assert_close(found[name][-3:], wanted[name])


def test_refuses_what_the_contract_excludes(device):
    args = inputs(5, 3, 16, device)
    weight, lists, x, scalars = (args[name] for name in ("weight", "lists", "x", "scalars"))
    sums = block_sums(lists, x, args["pull"], scalars)
    with pytest.raises(ValueError, match="a weight without its lower half must be fp32, got torch.bfloat16"):
        row_update(replace(weight, high=weight.high.bfloat16()), lists, x, scalars, sums=sums)
    for rows, offsets in ((x[:, :8], lists.offsets), (x, lists.offsets[1:])):
        with pytest.raises(ValueError, match=r"rows and lists must be \[..., 16\] and of 3 latents"):
            row_update(weight, replace(lists, offsets=offsets), rows, scalars, sums=sums)
    with pytest.raises(ValueError, match="a decoder needs inverse_norm"):
        row_update(replace(weight, inverse_norm=None), lists, x, scalars, sums=sums)
