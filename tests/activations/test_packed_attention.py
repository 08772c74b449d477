"""Packed rows without a mask: what each sequence gives is what it gives alone, or a refusal."""

import pytest
import torch
import torch.nn.functional as F

from sae_persona.activations import hooks, packed_attention
from sae_persona.activations.groups import Layout, groups
from sae_persona.activations.harvest import read_group
from sae_persona.activations.hooks import check_packing, read
from sae_persona.activations.lm import padded
from sae_persona.activations.packed_attention import needs_no_mask
from sae_persona.activations.sequences import Place
from sae_persona.activations.texts import read_texts
from sae_persona.errors import ModelError
from sae_persona.types import HookPoint

HOOK = HookPoint(1)
TEXTS = read_texts([("some words, " * 9)[: 3 + 7 * i % 40] for i in range(50)])
PACKED = Layout(context_size=16, lm_batch=2, which="all", pack=True)


def slow_varlen(q, k, v, bounds, longest, scale):
    """One sequence after the other, by plain SDPA."""
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(q) and bounds.diff().max() <= longest
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    cut = [x.tensor_split(bounds[1:-1].tolist()) for x in (q, k, v)]
    one = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv), is_causal=True, scale=scale).transpose(0, 1)
        for qkv in zip(*cut, strict=True)
    ]
    return torch.cat(one)


@pytest.fixture
def without_mask(monkeypatch):
    monkeypatch.setattr(packed_attention, "_varlen", lambda: slow_varlen)
    monkeypatch.setattr(hooks, "needs_no_mask", lambda lm: True)
    monkeypatch.setattr(hooks, "_mask", None)  # whoever makes one fails


def compare(lm, tolerance):
    check_packing(lm, HOOK, 16)
    for group in groups(lm, TEXTS, PACKED, Place()):
        found = read_group(lm, [HOOK], group)[HOOK].float()
        for i, one in enumerate(group.sequences):
            got = found[group.bounds[i] : group.bounds[i + 1]]
            alone = read(lm, [HOOK], *padded(lm, [one.ids]))[HOOK][0, len(one.ids) - len(got) :].float()
            assert (got - alone).norm() <= tolerance * alone.norm()


@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX", "Qwen2", "Gemma", "OPT"])
def test_sequences_are_kept_apart(make_lm, without_mask, family):
    lm = make_lm(family)
    compare(lm, 1e-5)
    assert lm.model.config._attn_implementation == "sdpa"


def test_attention_that_ignores_the_bounds_is_refused(make_lm, without_mask, monkeypatch):
    monkeypatch.setattr(
        packed_attention,
        "_varlen",
        lambda: lambda q, k, v, b, n, scale: slow_varlen(q, k, v, b[[0, -1]], len(q), scale),
    )
    with pytest.raises(ModelError, match="does not keep the sequences of a row apart"):
        check_packing(make_lm(), HOOK, 16)


def test_scores_that_the_kernel_does_not_know_are_refused_and_the_model_left_as_it_was(make_lm, without_mask):
    lm = make_lm("Gemma2")
    before = lm.model.config._attn_implementation
    with pytest.raises(ModelError, match="attention with softcap cannot run on packed rows: pass --no-pack"):
        check_packing(lm, HOOK, 16)
    assert lm.model.config._attn_implementation == before and packed_attention._now is None


def test_on_a_cpu_a_mask_is_used(lm):
    assert not needs_no_mask(lm)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX", "Qwen2", "Gemma", "OPT"])
def test_on_a_gpu_no_mask_is_made(make_lm, family, monkeypatch):
    lm = make_lm(family)
    lm.model.to("cuda", torch.bfloat16)
    assert needs_no_mask(lm)
    monkeypatch.setattr(hooks, "_mask", None)
    compare(lm, 0.02)


@pytest.mark.gpu
def test_the_kernel_gives_what_sequences_give_one_by_one():
    draw = torch.Generator("cuda").manual_seed(0)
    bounds = torch.tensor([0, 1, 130, 131, 260, 1024, 2048], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(2048, h, 64, device="cuda", generator=draw).bfloat16() for h in (8, 2, 2))
    varlen = packed_attention._varlen()
    assert varlen is not None
    want = slow_varlen(q.double(), k.double(), v.double(), bounds, 1024, 0.1)
    plain = slow_varlen(q, k, v, bounds, 1024, 0.1)
    assert (varlen(q, k, v, bounds, 1024, 0.1) - want).norm() <= 2 * (plain - want).norm()
