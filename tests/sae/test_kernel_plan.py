import gc
from dataclasses import asdict, replace

import pytest
import torch

from sae_persona.errors import ConfigError
from sae_persona.sae.kernel_plan import KernelConfig, padded, plan_step
from sae_persona.sae.kernel_step import KernelStep
from sae_persona.sae.sparsity import TopK
from sae_persona.sae.step import Weights

SIZES = {"n": 8192, "d_in": 2304, "n_latents": 65536, "k": 64}


def test_a_config_is_inert():
    config = KernelConfig(precision="fp8", slice_tokens=4096, graph=False)
    assert KernelConfig(**asdict(config)) == config
    with pytest.raises(AttributeError):
        config.moments = "bf16"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("precision", "fp16", "precision must be one of bf16, fp8, fp32, got 'fp16'"),
        ("moments", "fp8", "moments must be one of fp32, bf16, got 'fp8'"),
        ("slice_tokens", 0, "slice_tokens must be at least 1, got 0"),
        ("recall_every", 0, "recall_every must be at least 1"),
        ("recall_rows", -1, "recall_rows must be at least 1"),
        ("spare", 0.5, "spare must be at least 1, got 0.5"),
        ("candidates", float("nan"), "candidates must be at least 1, got nan"),
        ("auxk_tokens", 1.5, "auxk_tokens is a share between 0 and 1, got 1.5"),
        ("min_recall", -0.1, "min_recall is a share between 0 and 1, got -0.1"),
    ],
)
def test_a_value_out_of_range_is_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        KernelConfig(**{field: value})


def test_padded():
    assert [padded(size, 16) for size in (1, 16, 17, 2304)] == [16, 16, 32, 2304]


def test_a_plan_adds_up_and_says_what_it_is_made_of():
    plan = plan_step(KernelConfig(), **SIZES)
    assert plan.total == sum(plan.memory.values())
    assert plan.memory["moments"] == 2 * SIZES["n_latents"] * SIZES["d_in"] * 8
    assert "moments" in str(plan) and f"{plan.floor_ms:.2f} ms" in str(plan)


def test_what_a_setting_saves():
    plan = plan_step(KernelConfig(), **SIZES)

    def other(**settings):
        sizes = {name: settings.pop(name) for name in [*settings] if name not in asdict(KernelConfig())}
        return plan_step(replace(KernelConfig(), **settings), **SIZES | sizes)

    assert other(moments="bf16").memory["moments"] == plan.memory["moments"] / 2
    assert other(moments="bf16").predicted_ms < plan.predicted_ms
    assert other(precision="fp8").predicted_ms < plan.predicted_ms
    slices = "pre-activations of a slice"
    assert other(slice_tokens=1024).memory[slices] == plan.memory[slices] / 8
    assert other(slice_tokens=1024, rule="batch_topk").memory[slices] == plan.memory[slices]
    assert other(n_dead=1000).total > plan.total and other(n_dead=1000).predicted_ms > plan.predicted_ms
    assert other(rule="jumprelu").total > plan.total and other(n_prefixes=4).total > plan.total
    assert other(card="NVIDIA H100 80GB HBM3").predicted_ms > plan.predicted_ms


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, {"precision": "fp8"}, {"moments": "bf16", "slice_tokens": 2048}], ids=str)
def test_a_gpu_holds_what_was_planned(config):
    sizes = {"n": 8192, "d_in": 1024, "n_latents": 65536, "k": 32}
    plan = plan_step(KernelConfig(**config), **sizes)
    w = torch.nn.functional.normalize(torch.randn(sizes["n_latents"], sizes["d_in"]), dim=1)
    given = Weights(w, w.new_zeros(len(w)), w.clone(), w.new_zeros(sizes["d_in"]))
    x = torch.randn(sizes["n"], sizes["d_in"], device="cuda").bfloat16()
    gc.collect()  # what earlier tests left must not go while we look
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    step = KernelStep(
        given, TopK(sizes["k"]), config=KernelConfig(**config), k_aux=None, auxk_coef=0.0, dead_after=1, device="cuda"
    )
    torch.cuda.reset_peak_memory_stats()
    for _ in range(6):
        step(x, 3e-4)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(plan.total, rel=0.05)
