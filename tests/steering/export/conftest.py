"""Logits of the lab's model, tiny random models of other families, and interventions that every format is tried on."""

import pytest
import torch
import transformers

from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import LM, padded, wrap_lm
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Add, Placed, Steer
from sae_persona.types import HookPoint

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
FAMILIES = {"GPT2": {}, "GPTNeoX": {}, "Gemma2": {"head_dim": 16}, "Qwen2": {}, "Mixtral": {"num_local_experts": 3}}


@pytest.fixture(scope="session")
def make_lm(lm):
    """A random model of a family, with the lab's tokenizer."""

    def make(family: str) -> LM:
        torch.manual_seed(0)
        ids = {"vocab_size": len(lm.tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = getattr(transformers, f"{family}Config")(**SMALL, **ids, **FAMILIES[family])
        model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
        return wrap_lm(model, lm.tokenizer, name=f"tiny-{family}")

    return make


@pytest.fixture(scope="session")
def logits(prompts):
    """Logits at every token of some prompts, BOS first."""

    @torch.no_grad()
    def run(lm: LM, model=None) -> torch.Tensor:
        ids, mask = padded(lm, [[1, *prompt][:12] for prompt in prompts[:3]])
        return (model or lm.model)(**model_inputs(lm, ids, mask)).logits

    return run


@pytest.fixture(scope="session")
def edited(logits):
    """Logits with an intervention, after it was seen to change them."""

    def run(lm: LM, intervention: Intervention) -> torch.Tensor:
        with intervention.applied(lm):
            found = logits(lm)
        assert (found - logits(lm)).abs().max() > 0.01
        return found

    return run


@pytest.fixture
def sums(lm, sae):
    """What can be added: latents and a direction, at two layers, one of them named by what enters the next."""
    direction = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))
    edits = [
        Add(3, 1.5, 4.0),
        Add(8, -0.5, 4.0),
        Placed(edit=Steer(direction, 0.3), hook=HookPoint(2), positions="every"),
        Placed(edit=Steer(direction, 0.2), hook=HookPoint(4, "resid_pre"), positions="every"),
    ]
    return Intervention.of(lm, sae, edits, positions="every")


@pytest.fixture
def one_sum(lm, sae):
    return Intervention.of(lm, sae, [Add(3, 1.5, 4.0), Add(8, -0.5, 4.0)], positions="every")
