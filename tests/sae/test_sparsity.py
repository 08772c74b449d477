import pytest
import torch

from sae_persona.sae.sparsity import BatchTopK, JumpReLU, ReLU, Threshold, TopK, calibrate, cat, k_at


def pre_acts(n=9, n_latents=640):
    return torch.randn(n, n_latents, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [1, 3, 640])
def test_topk_keeps_the_k_largest_of_each_token(k):
    pre = pre_acts()
    level = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    torch.testing.assert_close(TopK(k).select(pre).dense(640), (pre * (pre >= level)).relu())


def test_topk_takes_the_lowest_index_of_equal_values():
    pre = (pre_acts() / 2).round()  # many of the largest value in each row
    wanted = pre.sort(dim=1, descending=True, stable=True).indices[:, :3]
    assert torch.equal(TopK(3).select(pre).idx.sort(dim=1).values, wanted.sort(dim=1).values)


def test_batch_topk_keeps_the_n_k_largest_positive_of_the_batch():
    pre = pre_acts() + torch.linspace(-1, 1, 9)[:, None]
    level = pre.flatten().sort(descending=True).values[9 * 3 - 1]
    latents = BatchTopK(3).select(pre)
    torch.testing.assert_close(latents.dense(640), pre * (pre >= level))
    assert latents.l0().sum() == 27 and latents.l0().unique().numel() > 1


def test_batch_topk_keeps_no_negative_value():
    latents = BatchTopK(2).select(torch.tensor([[-1.0, 3.0, -2.0], [-1.0, -1.0, -1.0]]))
    assert latents.acts.tolist() == [3.0] and latents.l0().tolist() == [1, 0]


def test_threshold_is_strict_and_never_lets_a_negative_value_through():
    pre = torch.tensor([[0.5, 0.6, -0.1]])
    assert Threshold(torch.tensor([0.5, 0.5, -1.0])).select(pre).dense(3).tolist() == [[0.0, pre[0, 1].item(), 0.0]]


@pytest.mark.parametrize("bandwidth", [0.1, 3.0])  # 3: near reaches below 0
def test_jumprelu_gives_what_fires_and_what_is_near(bandwidth):
    pre, threshold = pre_acts(), torch.linspace(0, 2, 640)
    chosen = JumpReLU(3, bandwidth, 1.0).select(pre, threshold)
    latents, window = chosen.latents, (pre - threshold).abs() < bandwidth / 2
    assert torch.equal(latents.dense(640), Threshold(threshold).select(pre).dense(640))
    near = torch.zeros_like(window)
    near[latents.token[chosen.near], latents.idx[chosen.near]] = True
    assert torch.equal(near, window)
    assert len(latents.idx) == (window | (pre > threshold)).sum() > chosen.near.sum()


@pytest.mark.parametrize("rule", [ReLU(), Threshold(torch.linspace(-1, 2, 640))], ids=["relu", "threshold"])
def test_gate_agrees_with_select(rule):
    pre, idx = pre_acts(), torch.tensor([639, 2, 2, 320])
    assert torch.equal(rule.gate(pre[:, idx], idx), rule.select(pre).dense(640)[:, idx])


@pytest.mark.parametrize("rule", [TopK(3), ReLU()], ids=["n k", "csr"])
def test_cat_is_the_whole(rule):
    pre = pre_acts()
    parts = cat([rule.select(part) for part in pre.split(4)])
    assert torch.equal(parts.dense(640), rule.select(pre).dense(640))


def test_calibrate_keeps_exactly_k_a_token():
    batches = list((pre_acts(12) * torch.rand(12, 1)).split(5))  # batches that need different thresholds
    level = calibrate(lambda x: x, batches, 3)
    assert sum((x > level).sum() for x in batches) == 36


def test_calibrate_never_goes_below_zero():
    assert calibrate(lambda x: x, [-torch.ones(2, 8)], 3) == 0.0


def test_k_falls_in_a_line_and_stays():
    ks = [k_at(step, 20, 4, 12, 0.5) for step in range(20)]
    assert ks[:10] == [12, 11, 10, 10, 9, 8, 7, 6, 6, 5] and ks[10:] == [4] * 10
    assert [k_at(step, 3, 4, 2, 1.0) for step in range(4)] == [2, 3, 3, 4], "upwards too"


def test_k_is_the_last_one_where_nothing_is_annealed():
    assert {k_at(step, None, 4, 12, 0.5) for step in range(20)} == {4}, "the number of steps is not known"
    assert {k_at(step, 20, 4, 12, 0.0) for step in range(20)} == {4}
    assert {k_at(step, 20, 4, 4, 0.5) for step in range(20)} == {4}
