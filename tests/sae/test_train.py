import json
import re
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch

from sae_persona.errors import ConfigError, DataError, RunError
from sae_persona.sae.loss import fvu
from sae_persona.sae.recipe import TrainConfig
from sae_persona.sae.sparsity import Threshold, TopK
from sae_persona.sae.train import Diverged, train

SMALL = TrainConfig(n_latents=64, k=4, steps=12, log_every=5)


def batches(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, 16, generator=generator) + 5 for _ in range(n)]


def test_config_is_inert():
    config = TrainConfig(n_latents=100, steps=7)
    assert TrainConfig(**asdict(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.k = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"k": 0}, {"k": 5000}, {"rule": "relu"}, {"steps": 0}, {"decay": 1.5}, {"lr": -1.0}, {"lr": float("nan")}),
        *({"clip": 0.0}, {"clip": float("inf")}, {"bandwidth": 0.0}, {"bandwidth": -1.0}, {"sparsity_coef": -1.0}),
        *({"prefixes": p} for p in [(1024,), (4096, 4096), (2048, 1024, 4096), (0, 4096), (64, 5000)]),
    ],
    ids=str,
)
def test_config_refuses(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_learning_rate_rises_then_falls_to_nearly_0():
    config = TrainConfig(lr=1.0, warmup=10, decay=0.5)
    rates = [config.lr_at(step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:50] == [1.0] * 41 and rates[75] == 0.5 and rates[99] == 0.02
    assert config.lr_at(99, None) == 1.0
    assert TrainConfig(n_latents=2**14).peak_lr == 2e-4 and TrainConfig(n_latents=2**12).peak_lr == 4e-4


def test_planted_atoms_are_recovered(planted, trained):
    best = (planted.atoms @ trained.w_dec.T).max(dim=1).values
    assert (best > 0.95).float().mean() > 0.9
    x = torch.cat(planted.held_out)
    assert fvu(x, trained.decode(trained.encode(x))) < 0.15
    norms = trained.w_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_l0_on_held_out_tokens_is_k(planted, trained):
    l0 = trained.encode(torch.cat(planted.held_out)).l0().double().mean()
    # jumprelu weighs L0 against the error, the others count
    off = 4 * (0.1 if trained.metadata["training"]["rule"] == "jumprelu" else 0.02)
    assert abs(l0 - 4) < off
    assert isinstance(trained.rule, Threshold | TopK) and abs(trained.metadata["l0"] - 4) < off


def test_thresholds_begin_where_k_latents_fire_and_are_folded_with_the_scale():
    data = [7 * x for x in batches(3)]
    sae = train(data, replace(SMALL, rule="jumprelu", steps=3, lr=0.0), progress=False)
    assert isinstance(sae.rule, Threshold) and sae.metadata["l0"] == pytest.approx(4, abs=1 / 64)


def test_thresholds_are_trained_one_by_one():
    sae = train(batches(), replace(SMALL, rule="jumprelu", lr=1e-2), progress=False)
    assert sae.rule.threshold.unique().numel() > 32 and (sae.rule.threshold >= 0).all()


@pytest.mark.parametrize("rule", ["topk", "batch_topk", "jumprelu"])
def test_the_first_prefix_explains_more_than_as_many_latents_of_a_plain_sae(planted, planted_config, rule):
    x, explained = torch.cat(planted.held_out), []
    for prefixes in [(), (8, 128)]:
        config = replace(planted_config, rule=rule, steps=300, prefixes=prefixes)
        sae = train(planted.batches, config, progress=False)
        acts = sae.encode(x).dense(128)
        assert fvu(x, acts @ sae.w_dec + sae.b_dec) < 0.3
        explained.append(1 - fvu(x, acts[:, :8] @ sae.w_dec[:8] + sae.b_dec).item())
    assert explained[1] > 1.2 * explained[0]


def test_clipping_and_prefixes_reach_the_step():
    plain = train(batches(), SMALL, progress=False).fingerprint
    assert train(batches(), replace(SMALL, clip=1e6), progress=False).fingerprint == plain
    assert train(batches(), replace(SMALL, prefixes=(64,)), progress=False).fingerprint == plain
    for other in ({"clip": 1e-3}, {"prefixes": (8, 64)}):
        assert train(batches(), replace(SMALL, **other), progress=False).fingerprint != plain, other


@pytest.mark.parametrize(("rule", "prefixes"), [("topk", ()), ("batch_topk", ()), ("jumprelu", (8, 64))])
def test_same_seed_same_bits(rule, prefixes):
    config = replace(SMALL, rule=rule, prefixes=prefixes)
    first, again, other = (train(batches(), c, progress=False) for c in (config, config, replace(config, seed=1)))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_training_starts_at_the_mean_and_reads_raw_activations():
    """Untrained, the SAE rebuilds a batch at its mean as exactly the mean: nothing fires, b_dec is the mean."""
    data = batches(3)
    sae = train(data, replace(SMALL, steps=1, lr=0.0), progress=False)
    mean = torch.cat(data[:1]).mean(dim=0)
    torch.testing.assert_close(sae.b_dec.data, mean)
    torch.testing.assert_close(sae.pre_acts(mean[None]), torch.zeros(1, 64), atol=1e-5, rtol=0)


def test_metrics_are_written_and_handed_on_without_any_other_setting(tmp_path):
    seen = []
    train(batches(), SMALL, out=tmp_path / "run" / "metrics.jsonl", on_step=seen.append, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == seen and [line["step"] for line in lines] == [5, 10, 12]
    assert lines[-1]["tokens"] == 12 * 64
    assert set(lines[0]) == {"step", "tokens", "loss", "auxk", "fvu", "l0", "dead", "lr", "tokens_per_s"}


def test_jumprelu_tells_of_its_sparsity_loss():
    lines = []
    train(batches(), replace(SMALL, rule="jumprelu"), on_step=lines.append, progress=False)
    assert all(line["sparsity"] == pytest.approx(16 * (line["l0"] / 4 - 1) ** 2, abs=1e-5) for line in lines)


def test_metrics_are_flushed_line_by_line(tmp_path):
    path, sizes = tmp_path / "metrics.jsonl", []
    train(batches(), SMALL, out=path, on_step=lambda _: sizes.append(path.stat().st_size), progress=False)
    assert 0 < sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("known", [True, False], ids=["steps", "one pass of a generator"])
def test_the_bar_ends_at_100_percent_on_stderr(known, capsys):
    source = batches() if known else iter(batches())
    train(source, replace(SMALL, steps=12 if known else None))
    out, err = capsys.readouterr()
    last = re.split(r"[\r\n]", err.strip())[-1]
    assert out == "" and "100%" in last
    assert all(word in last for word in ("loss=", "fvu=", "l0=", "dead=", "tokens_per_s="))


def test_one_pass_takes_each_batch_once_and_tells_of_the_last():
    lines = []
    sae = train(iter(batches(9)), replace(SMALL, steps=None), on_step=lines.append, progress=False)
    assert sae.metadata["n_tokens"] == 9 * 64 and [line["step"] for line in lines] == [5, 9]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(bad):
    data = batches()
    data[4][3, 2] = bad
    with pytest.raises(DataError, match="batch 4 has NaN or infinite"):
        train(data, SMALL, progress=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "there is no batch to train on"),
        (iter(batches(3)), "ended after 3 of 12 steps"),
        ([torch.ones(64, 16)] * 3, "all activations are equal"),
        ([*batches(2), torch.zeros(64, 15)], r"must be floats \[n, 16\], got torch.float32 \[64, 15\]"),
        ([torch.zeros(2, 3, 4)], r"must be floats \[n, d_in\]"),
    ],
    ids=["none", "too few", "constant", "width", "shape"],
)
def test_batches_that_cannot_be_trained_on_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        train(data, SMALL, progress=False)


def test_a_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at step"):
        train(batches(), replace(SMALL, lr=1e38, warmup=0), progress=False)


def test_an_out_that_cannot_be_written_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        train(batches(), SMALL, out=tmp_path / "file" / "metrics.jsonl", progress=False)


@pytest.mark.parametrize("rule", ["topk", "batch_topk", "jumprelu"])
def test_a_loss_that_is_not_finite_leaves_the_sae_of_the_last_good_step(rule):
    data = batches(12)
    config = replace(SMALL, rule=rule, steps=None, decay=0.0, log_every=13)
    kept = train(data, config, progress=False)
    spoilt = [*data, torch.full_like(data[0], 1e30)]  # finite, but its square is not
    with pytest.raises(Diverged, match="the loss is inf at step 13") as caught:
        train(spoilt, config, progress=False)
    assert caught.value.sae is not None
    for name, wanted in kept.named_parameters():
        torch.testing.assert_close(caught.value.sae.get_parameter(name), wanted, rtol=0, atol=0, msg=name)


def test_weights_that_give_nothing_finite_are_not_kept():
    with pytest.raises(Diverged) as caught:
        train(batches(), replace(SMALL, lr=1e38, warmup=0), progress=False)
    assert caught.value.sae is None
