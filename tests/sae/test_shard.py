"""Ranks that share a dictionary against one that has it all. Run as a program, this file is one of the ranks."""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sae_persona.errors import ConfigError, FormatError, RunError
from sae_persona.sae.kernel_plan import KernelConfig
from sae_persona.sae.plain_step import PlainStep
from sae_persona.sae.shard import ALONE, Shard, joined
from sae_persona.sae.shard_state import Kept, gathered, kept, put
from sae_persona.sae.sparsity import BatchTopK, JumpReLU, TopK
from sae_persona.sae.step import Weights

N, D_IN, N_LATENTS, K, STEPS, DEAD_AFTER = 24, 10, 61, 4, 6, 100
RULES = {"topk": TopK(K), "topk of most": TopK(40), "batch_topk": BatchTopK(K), "jumprelu": JumpReLU(K, 0.5, 3.0)}
SETTINGS = {
    "": {},
    "nested": {"prefixes": (7, 20, N_LATENTS)},
    "clipped": {"clip": 0.5},
    "few dead": {"dead": range(0, 60, 20), "k_aux": 5},
    "many dead": {"dead": range(0, 60, 2), "k_aux": 5},
    "dead on one rank": {"dead": range(8), "k_aux": 5},
    "all at once": {"prefixes": (7, 20, N_LATENTS), "clip": 0.5, "dead": range(0, 60, 2), "k_aux": 40},
}
CASES = {f"{rule} {setting}".strip(): (RULES[rule], SETTINGS[setting]) for rule in RULES for setting in SETTINGS}
OF_THREE = ["topk", "topk many dead", "topk all at once", "batch_topk", "jumprelu nested"]
KERNEL_CASES = {  # through the kernels: rule, settings, settings of the kernels
    "topk sliced nested clipped": (TopK(3), {"prefixes": (7, 20, N_LATENTS), "clip": 0.5}, {"slice_tokens": 3}),
    "batch_topk nested with dead latents": (BatchTopK(3), SETTINGS["all at once"] | {"k_aux": 8, "clip": None}, {}),
    "jumprelu clipped": (JumpReLU(3, 0.5, 3.0), {"clip": 2.0}, {"spare": 12.0}),
}
KERNEL_N, KERNEL_STEPS = 4, 2  # Triton's interpreter is slow
every_case = pytest.mark.parametrize("case", CASES)


def weights(*, whole_numbers: bool = False) -> Weights:
    g = torch.Generator().manual_seed(0)
    w_enc, b_enc, w_dec, b_dec = (torch.randn(*s, generator=g) for s in ((61, 10), (61,), (61, 10), (10,)))
    if whole_numbers:  # products of which are exact in any order
        w_enc, b_enc = w_enc.round(), b_enc.round()
    return Weights(w_enc, b_enc, torch.nn.functional.normalize(w_dec, dim=1), b_dec)


def batches(count: int = STEPS) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(N, D_IN, generator=g) for _ in range(count)]


def make(shard: Shard, rule, *, given=None, dead=(), k_aux=0, **settings) -> PlainStep:
    w_enc, b_enc, w_dec, b_dec = given or weights()
    own = Weights(*(shard.block(w).clone() for w in (w_enc, b_enc, w_dec)), b_dec.clone())
    threshold = shard.block(torch.linspace(0, 4, N_LATENTS)).clone() if isinstance(rule, JumpReLU) else None
    step = PlainStep(
        own, rule, threshold=threshold, k_aux=k_aux, auxk_coef=1 / 4, dead_after=DEAD_AFTER, shard=shard, **settings
    )
    silent = torch.zeros(N_LATENTS, dtype=torch.int64)
    silent[list(dead)] = DEAD_AFTER
    step.silent.copy_(shard.block(silent))
    return step


def result(step, measures: list[dict]) -> dict:
    """What a rank knows in the end; rank 0 has all the weights."""
    whole = gathered(step)
    found = {"measures": measures, "b_dec": step.weights.b_dec.clone(), "silent": step.silent.clone()}
    found |= {"flagged": step.flagged, "moments": {n: x.clone() for n, x in kept(step).whole.items()}}
    if whole is not None:
        found |= dict(zip(Weights._fields, whole[0], strict=True)) | {"threshold": whole[1]}
    return found


def trained(shard: Shard, case: str) -> dict:
    rule, settings = CASES[case]
    step = make(shard, rule, **settings)
    return result(step, [step(x, 1e-3).measures() for x in batches()])


def tied(shard: Shard) -> dict:
    """One step with every latent twice, a half of the dictionary apart, so that the last of an odd k is a tie."""
    given = weights(whole_numbers=True)
    for w in given[:2]:
        w[31:] = w[:30]
    step = make(shard, TopK(3), given=given)
    return result(step, [step(batches()[0].round(), 1e-3).measures()])


def through_kernels(shard: Shard, case: str) -> dict:
    """With kernels where ranks share the latents, else in plain torch."""
    rule, settings, config = KERNEL_CASES[case]
    step = make(shard, rule, **settings)
    if shard.world > 1:
        step = as_kernels(step, config)
    return result(step, [step(x[:KERNEL_N], 1e-3).measures() for x in batches(KERNEL_STEPS)])


def as_kernels(plain: PlainStep, config: dict, **settings):
    from sae_persona.sae import kernel_auxk
    from sae_persona.sae.kernel_step import KernelStep

    kernel_auxk.ROOM = 16
    settings = {"prefixes": () if plain.prefixes is None else (7, 20, N_LATENTS), "k_aux": plain.k_aux} | settings
    step = KernelStep(
        plain.weights, plain.rule, config=KernelConfig(**({"precision": "fp32", "auxk_tokens": 1.0} | config)),
        threshold=plain.threshold, auxk_coef=plain.auxk_coef, dead_after=DEAD_AFTER, clip=plain.clip,
        shard=plain.shard, **settings,
    )  # fmt: skip
    step.silent.copy_(plain.silent)
    step._dead_count.write(plain.shard.max(step.dead.sum().float()))  # what it would have read some steps before
    return step


def tied_in_kernels(shard: Shard) -> list[int]:
    """Of 9 latents a rank, all alike but for the last, which are the rank's that fire."""
    from sae_persona.sae.kernel_step import KernelStep

    w = torch.ones(18, D_IN)
    w[8], w[17] = 2, 3
    own = Weights(shard.block(w), torch.zeros(9), shard.block(w), torch.zeros(D_IN))
    fired = []
    for rule in (TopK(4), BatchTopK(4)):
        config = KernelConfig(precision="fp32")
        step = KernelStep(own, rule, config=config, k_aux=0, auxk_coef=0.0, dead_after=1, shard=shard)
        step(torch.ones(1, D_IN), 1e-3)
        fired.append((step.silent == 0).nonzero().flatten().tolist())
    return fired


def kernels_refuse(shard: Shard) -> list[str]:
    said = []
    for k, precision in ((31, "fp32"), (3, "fp8")):
        try:
            as_kernels(make(shard, TopK(k)), {"precision": precision})
        except ConfigError as error:
            said.append(str(error))
    return said


def spoilt(shard: Shard) -> dict:
    step = make(shard, TopK(K), clip=1.0)
    xs = batches(3)
    xs[1][3, 2] = torch.inf
    for x in xs:
        step(x, 1e-3)
    return result(step, [])


def begun(shard: Shard) -> Kept:
    """What is kept of the first half of a run with everything in it."""
    rule, settings = CASES["jumprelu all at once"]
    step = make(shard, rule, **settings)
    for x in batches()[: STEPS // 2]:
        step(x, 1e-3)
    return kept(step)


def resumed(shard: Shard, parts: list[Kept]) -> dict:
    """The second half, from other weights that are overwritten."""
    rule, settings = CASES["jumprelu all at once"]
    step = make(shard, rule, **settings)
    step(batches()[5], 1e-2)
    put(step, parts)
    return result(step, [step(x, 1e-3).measures() for x in batches()[STEPS // 2 :]])


# ---- the ranks


def rank_main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    shard = Shard(rank, world)
    found = {case: trained(shard, case) for case in (CASES if world == 2 else OF_THREE)}
    found |= {"tied": tied(shard), "spoilt": spoilt(shard), "begun": vars(begun(shard)), "refused": wrong_block(shard)}
    if world == 2:
        found |= {f"kernels {case}": through_kernels(shard, case) for case in KERNEL_CASES}
        found |= {"kernels tied": tied_in_kernels(shard), "kernels refused": kernels_refuse(shard)}
    if world == 3:
        parts = [Kept(**torch.load(folder.parent / "two" / f"{r}.pt", weights_only=True)["begun"]) for r in range(2)]
        found["resumed"] = resumed(shard, parts)
        found["lost"] = lose_one(shard)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def wrong_block(shard: Shard) -> str:
    whole = weights()
    rows = 40 if shard.rank == 0 else 21
    own = Weights(whole.w_enc[:rows], whole.b_enc[:rows], whole.w_dec[:rows], whole.b_dec)
    try:
        PlainStep(own, TopK(K), k_aux=0, auxk_coef=0, dead_after=1, shard=shard)
    except ConfigError as error:
        return str(error)
    return ""


def lose_one(shard: Shard) -> tuple[str, float]:
    """The last rank dies in the third step: what another one is told, and after how many seconds."""
    step = make(shard, TopK(K))
    begun_at = time.monotonic()
    for i, x in enumerate(batches()):
        if i == 2 and shard.rank == shard.world - 1:
            os._exit(9)
        try:
            step(x, 1e-3)
        except RunError as error:
            return str(error), time.monotonic() - begun_at
    return "", 0.0


def start(folder: Path, world: int) -> list[int]:
    """The exit statuses of ``world`` ranks."""
    folder.mkdir()
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, json.dumps([str(folder), rank, world])], env=env)
        for rank in range(world)
    ]
    try:
        return [rank.wait(timeout=500) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


# ---- the tests


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks", numbered=False) / "two"
    assert start(folder, 2) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def three(two, tmp_path_factory) -> list[dict]:
    """Without the last of them, which dies in the end."""
    folder = tmp_path_factory.getbasetemp() / "ranks" / "three"
    assert start(folder, 3) == [0, 0, 9]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def agree(ranks: list[dict], alone: dict, rel: float = 1e-6) -> None:
    """All ranks have told the same, and what one process tells."""
    for i, rank in enumerate(ranks):
        assert rank["measures"] == ranks[0]["measures"]
        assert torch.equal(rank["b_dec"], ranks[0]["b_dec"]), f"b_dec of rank {i}"
        for name, x in rank["moments"].items():
            assert torch.equal(x, ranks[0]["moments"][name]), f"{name} of rank {i}"
    for got, wanted in zip(ranks[0]["measures"], alone["measures"], strict=True):
        assert got == pytest.approx(wanted, rel=rel)
    for name in (*Weights._fields, "threshold"):
        got, wanted = ranks[0][name], alone[name]
        assert (got is None) == (wanted is None)
        if wanted is not None:
            assert got.shape == wanted.shape and (got - wanted).norm() <= 1e-5 * wanted.norm(), name
    silent = torch.cat([rank["silent"] for rank in ranks])
    assert torch.equal(silent, alone["silent"][: len(silent)])
    assert [rank["flagged"] for rank in ranks] == [alone["flagged"]] * len(ranks)


@every_case
def test_two_ranks_train_as_one(two, case):
    alone = trained(ALONE, case)
    agree([rank[case] for rank in two], alone)
    assert ("dead" in case or "all" in case) == any(m["auxk"] > 0 for m in alone["measures"])


@pytest.mark.parametrize("case", OF_THREE)
def test_three_ranks_train_as_one(three, case):
    agree([rank[case] for rank in three], trained(ALONE, case))


def test_of_equal_latents_on_two_ranks_the_lowest_fires(two, three):
    alone = tied(ALONE)
    fired = alone["silent"] == 0
    assert fired.sum() > 3 and (fired[:30] & ~fired[31:]).any()  # ties there were
    agree([rank["tied"] for rank in two], alone)
    agree([rank["tied"] for rank in three], alone)


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_two_ranks_train_through_kernels_as_one_in_plain_torch(two, case):
    alone = through_kernels(ALONE, case)
    agree([rank[f"kernels {case}"] for rank in two], alone, rel=1e-5)
    assert ("dead" in case) == any(m["auxk"] > 0 for m in alone["measures"])


def test_of_equal_latents_on_two_ranks_the_lowest_fires_in_kernels(two):
    assert [rank["kernels tied"] for rank in two] == [[[0, 1, 8]] * 2, [[8]] * 2]


def test_what_kernels_do_not_share_is_refused(two):
    least, fp8 = two[0]["kernels refused"]
    assert least == "k must be at most the 30 latents of a rank, got 31: use fewer ranks"
    assert fp8 == "precision fp8 is not sharded on GPUs yet: use bf16"


def test_a_batch_that_is_not_finite_is_left_out_by_all(two):
    alone = spoilt(ALONE)
    assert alone["flagged"] == 1
    agree([rank["spoilt"] for rank in two], alone)


def test_a_run_goes_on_with_another_number_of_ranks(two, three):
    wanted = resumed(ALONE, [begun(ALONE)])
    straight = trained(ALONE, "jumprelu all at once")
    assert wanted["measures"] == straight["measures"][STEPS // 2 :] and torch.equal(wanted["w_enc"], straight["w_enc"])
    parts = [Kept(**rank["begun"]) for rank in two]
    agree([resumed(ALONE, parts)], wanted)
    agree([rank["resumed"] for rank in three], wanted)


def test_parts_that_do_not_fit_are_refused(two):
    step, parts = make(ALONE, TopK(K)), [Kept(**rank["begun"]) for rank in two]
    with pytest.raises(FormatError, match=r"a part must be of 61 latents with silent, .*, got 61 with .*threshold"):
        put(step, parts)
    rule, settings = CASES["jumprelu all at once"]
    step = make(ALONE, rule, **settings)
    for some, count in ((parts[:1], 31), ([*parts, parts[0]], 92)):
        with pytest.raises(FormatError, match=f"must hold latents 0 to 60 once, got {count} of them"):
            put(step, some)


def test_a_lost_rank_ends_the_others_with_one_line_at_once(three):
    for rank in three:
        said, seconds = rank["lost"]
        assert said.startswith("a rank was lost: resume from the last checkpoint (") and "\n" not in said
        assert seconds < 5


def test_rows_that_are_no_block_are_refused(two):
    wanted = "rank 1 of 2 must hold latents 31 to 60 of 61, got 21 rows: give each rank shard.block(rows)"
    assert two[1]["refused"] == wanted
    assert two[0]["refused"].startswith("rank 0 of 2 must hold latents 0 to 30 of 61, got 40 rows")


@pytest.mark.parametrize(("n_latents", "world"), [(61, 2), (61, 3), (60, 3), (2, 3), (131072, 8)])
def test_blocks_are_contiguous_and_of_even_size(n_latents, world):
    bounds = [Shard(rank, world).bounds(n_latents) for rank in range(world)]
    assert [first for first, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])] and bounds[-1][1] == n_latents
    sizes = [stop - first for first, stop in bounds]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert Shard(0, world).bounds(n_latents, world - 1) == bounds[-1]


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as shard:
        assert shard == ALONE
    x = torch.randn(4, 3)
    assert shard.block(x).equal(x) and shard.sum(x) is x and shard.summed(x) is x and shard.gather(x).equal(x[None])
    assert shard.total(5) == shard.most(5) == 5 and shard.placed(7) == (0, 7)


if __name__ == "__main__":
    at, *rest = json.loads(sys.argv[1])
    rank_main(Path(at), *rest)
