"""Encoding by way of bf16 against `SAE.encode` in fp32."""

import pytest
import torch

from sae_persona.errors import ModelError
from sae_persona.sae import encoder
from sae_persona.sae.encoder import Encoder
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Threshold, TopK
from sae_persona.types import SparseLatents

N_LATENTS, D_IN = 600, 48


def made(rule, device="cpu") -> SAE:
    draw = torch.Generator().manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(N_LATENTS, D_IN, generator=draw), dim=1)
    b = torch.randn(N_LATENTS, generator=draw) * 0.2
    if rule == "threshold":
        rule = Threshold(torch.rand(N_LATENTS, generator=draw) * 6)
    return SAE(w, b, w, torch.zeros(D_IN), rule).to(device)


def tokens(n: int, device="cpu") -> torch.Tensor:
    x = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1)) * 4
    x[:, 5] *= 20  # a dimension such as models have, which bf16 rounds most
    return x.bfloat16().to(device)


@pytest.mark.parametrize("rule", [TopK(8), TopK(N_LATENTS), ReLU(), "threshold"], ids=str)
def test_candidates_by_bf16_lose_nothing(rule, device, monkeypatch):
    monkeypatch.setattr(encoder, "PRE_ENTRIES", 100 * N_LATENTS)
    monkeypatch.setattr(encoder, "GATHERED", 999 * D_IN)
    sae, x = made(rule, device), tokens(250, device)
    wanted = sae.encode(x.float()).dense(N_LATENTS)
    found = Encoder(sae, reduced=True)(x)
    torch.testing.assert_close(found.dense(N_LATENTS), wanted, atol=1e-4, rtol=1e-5)
    assert found.acts.dtype == torch.float32 and found.idx.dtype == torch.int64


def test_without_a_margin_some_would_be_lost(monkeypatch):
    monkeypatch.setattr(encoder, "SIGMAS", 0)
    sae, x = made("threshold"), tokens(250)
    found, wanted = Encoder(sae, reduced=True)(x), sae.encode(x.float())
    assert len(found.acts) < len(wanted.acts)


def test_on_a_cpu_it_is_the_saes_own(device):
    sae, x = made(TopK(8)), tokens(20)
    found, wanted = Encoder(sae)(x), sae.encode(x.float())
    assert torch.equal(found.acts, wanted.acts) and torch.equal(found.idx, wanted.idx)
    with pytest.raises(ModelError, match="width 48"):
        Encoder(sae)(x[:, 1:])


def test_the_kernels_find_and_rescore_the_same(device):
    """In fp32, which Triton's interpreter computes right."""
    sae, x = made(TopK(8), device), tokens(6, device).float()
    encode = Encoder(sae, reduced=True)
    encode.w = sae.w_enc.float()
    candidates = encode._candidates(x)
    wanted = sae.pre_acts(x).topk(16, dim=1).indices.sort(dim=1).values
    assert torch.equal(candidates.long(), wanted)
    acts, idx = encode._rescored(x, candidates)
    torch.testing.assert_close(
        SparseLatents(acts, idx).dense(N_LATENTS), sae.encode(x).dense(N_LATENTS), atol=1e-4, rtol=1e-5
    )
