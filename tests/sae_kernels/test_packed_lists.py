import pytest
import torch
from sae_kernels import packed_lists as module
from sae_kernels import reference
from sae_kernels.packed_lists import latent_order, packed_lists

gpu = pytest.mark.gpu
SHAPES = [(1, 1, 1), (5, 30, 1), (9, 77, 3), (2**15, 40, 2), pytest.param((4097, 512 * 32 + 5, 2), marks=gpu)]


def inputs(n_latents, capacity, blocks, device, near=False):
    g = torch.Generator().manual_seed(0)
    idx = torch.randint(n_latents, (capacity,), generator=g).int()
    idx[::3] = 0  # a latent that fires a lot
    idx[idx == 1] = 2 % n_latents  # one that never does
    idx[-capacity // 10 :] = n_latents  # entries that are none
    token = torch.arange(capacity).int() // 3
    acts, d_acts, window = (
        torch.randn(*s, generator=g) for s in ((capacity,), (blocks, capacity), (capacity,))
    )  # fmt: skip
    args = {"idx": idx, "token": token, "acts": acts, "d_acts": d_acts, "near": window if near else None}
    return {name: one if one is None else one.to(device) for name, one in args.items()} | {"n_latents": n_latents}


def run(op, args, dtype):
    found = {name: one for name, one in vars(op(**args)).items() if one is not None}
    return found | {"latent": found["latent"].long()}  # 16 bits where they suffice


@pytest.mark.parametrize("near", [False, True], ids=["", "near"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, near, device, poison, agrees, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    agrees(run, packed_lists, reference.packed_lists, inputs(*shape, device, near), torch.float32)


@pytest.mark.parametrize("shape", [*SHAPES, pytest.param((2**15, 16390, 1), marks=gpu)], ids=str)
def test_the_order_matches_reference_and_serves_as_one_of_its_own(shape, device, poison):
    args = inputs(*shape, device)
    found, wanted = (op(args["idx"], shape[0]) for op in (latent_order, reference.latent_order))
    for name, one in vars(wanted).items():
        assert torch.equal(getattr(found, name).long(), one.long()), name
    assert found.offsets.dtype == torch.int32
    given, made = packed_lists(**args, order=found), packed_lists(**args)
    assert all(torch.equal(getattr(given, name), one) for name, one in vars(made).items() if one is not None)


def test_what_is_moved_keeps_its_bits(device, poison):
    """Also NaN, and where there is a single part."""
    args = inputs(9, 77, 1, device, near=True)
    args["acts"][5] = args["d_acts"][0, 6] = args["near"][7] = torch.nan
    got, wanted = run(packed_lists, args, None), run(reference.packed_lists, args, None)
    assert all(torch.equal(got[name].nan_to_num(7.0), wanted[name].nan_to_num(7.0)) for name in wanted)


def test_entries_of_a_latent_come_by_rising_token(device):
    lists = packed_lists(**inputs(9, 77, 3, device))
    for latent in range(9):
        start, stop = lists.offsets[latent : latent + 2].tolist()
        assert (lists.latent[start:stop] == latent).all() and (lists.token[start:stop].diff() >= 0).all()


def test_refuses_what_the_contract_excludes(device):
    args = inputs(5, 30, 2, device)
    for bad in (args["idx"].long(), args["idx"][None]):
        with pytest.raises(ValueError, match=r"idx must be int32 \[capacity\]"):
            latent_order(bad, 5)
    with pytest.raises(ValueError, match="idx must be int32"):
        packed_lists(**args | {"idx": args["idx"].long()})
    for bad in (
        {"token": args["token"][1:]},
        {"acts": args["acts"][1:]},
        {"d_acts": args["d_acts"][:, 1:]},
        {"d_acts": args["d_acts"][0]},
    ):
        with pytest.raises(ValueError, match=r"there must be token and acts \[30\] and d_acts \[blocks, 30\]"):
            packed_lists(**args | bad)
