"""The lab's model with a small random SAE, and chats to answer."""

import pytest
import torch

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import LM, load_lm
from sae_persona.lab import corpora
from sae_persona.sae.formats import hook_metadata
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import Rule, Threshold, TopK
from sae_persona.types import HookPoint

HOOK = HookPoint(2)
N_LATENTS = 40


@pytest.fixture(scope="session")
def lm() -> LM:
    return load_lm("lab")


def random_sae(lm: LM, rule: Rule) -> SAE:
    """Latents that fire on about a third of the tokens."""
    g = torch.Generator().manual_seed(0)
    w_enc = torch.randn(N_LATENTS, lm.d_model, generator=g)
    w_dec = torch.nn.functional.normalize(torch.randn(N_LATENTS, lm.d_model, generator=g), dim=1)
    bias = torch.zeros(N_LATENTS)
    return SAE(w_enc, bias, w_dec, torch.zeros(lm.d_model), rule, hook_metadata(lm, HOOK))


@pytest.fixture(scope="session")
def sae(lm: LM) -> SAE:
    return random_sae(lm, Threshold(torch.full((N_LATENTS,), 0.5)))


@pytest.fixture(scope="session")
def topk_sae(lm: LM) -> SAE:
    return random_sae(lm, TopK(8))


@pytest.fixture(scope="session")
def prompts(lm: LM) -> list[list[int]]:
    """Prompts of different lengths."""
    chats = [row["messages"][:-1] for row in corpora.labelled(6, "train")]
    short = [row["messages"] for row in corpora.question_rows("formal", 3, "train")]
    return [prompt_tokens(lm, chat) for chat in (*chats, *short)]
