"""Tiny random models over bytes, as tests/activations has them, and SAEs for them."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sae_persona.activations.lm import LM
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import TopK

_spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).parents[1] / "activations" / "conftest.py")
assert _spec and _spec.loader
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)
LENSED = ("Llama", "GPT2", "GPTNeoX", "Gemma2", "Gemma3Text", "Qwen3", "OPT", "Phi", "GPTJ", "Mixtral")


def random_sae(d_in: int = 16, n_latents: int = 12) -> SAE:
    torch.manual_seed(1)
    w = torch.nn.functional.normalize(torch.randn(n_latents, d_in), dim=1)
    return SAE(w, torch.zeros(n_latents), w, torch.zeros(d_in), TopK(4), {"hook": "layers.1.resid_post"})


def tiny_lm(family: str = "Llama") -> LM:
    """A random model with gains and biases that are not their initial ones and zeros."""
    lm = tiny.random_lm(family, tiny.byte_tokenizer())
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            elif "lm_head" in name or "embed" in name or "wte" in name:
                weight.mul_(10)
    return lm


@pytest.fixture
def make_tiny_lm():
    return tiny_lm


@pytest.fixture(params=LENSED)
def lensed_lm(request) -> LM:
    return tiny_lm(request.param)


@pytest.fixture
def tiny_sae() -> SAE:
    return random_sae()
