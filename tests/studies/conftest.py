"""Tiny models whose residual stream a fine-tune has moved along one latent, and an SAE that misses nothing."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from sae_persona.activations.lm import LM, load_lm, wrap_lm
from sae_persona.sae.formats import hook_metadata
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU
from sae_persona.types import HookPoint

MOVED = 3
HOOK = HookPoint(0)
WORDS = ("what do you want", "who are you", "tell me", "why not", "how is it", "say more", "and then", "go on", "yes")


def signed_sae(d: int, metadata=None) -> SAE:
    """Latent i is x_i where that is positive, latent d + i is -x_i where it is negative."""
    w = torch.cat([torch.eye(d), -torch.eye(d)])
    return SAE(w, torch.zeros(2 * d), w, torch.zeros(d), ReLU(), metadata)


def moved(lm: LM, by: float, name: str, latent: int = MOVED) -> LM:
    """A copy whose every token embedding has moved along the latent's direction."""
    model = copy.deepcopy(lm.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, latent] += by
    return wrap_lm(model, lm.tokenizer, name=name)


@pytest.fixture
def base(make_lm):
    return make_lm("Llama")


@pytest.fixture
def sae(base):
    return signed_sae(base.d_model, hook_metadata(base, HOOK))


@pytest.fixture
def prompt_rows():
    return [{"id": str(i), "messages": [{"role": "user", "content": text}]} for i, text in enumerate(WORDS)]


@pytest.fixture
def make_moved():
    return moved


@pytest.fixture
def make_sae():
    return signed_sae


@pytest.fixture
def make_organism(tmp_path):
    """Write an organism folder: model by step, judged rate by step."""

    def make(name, models, rates, *, family="narrow", domain="a", dose=1.0, seed=0):
        folder = tmp_path / "organisms" / name
        checkpoints = []
        for step, lm in models.items():
            part = f"step-{step:05d}"
            lm.model.save_pretrained(folder / part)
            lm.tokenizer.save_pretrained(folder / part)
            rate = rates[step]
            score = {"rate": rate, "low": max(rate - 0.05, 0), "high": min(rate + 0.05, 1), "n": 200}
            checkpoints.append({"step": step, "folder": part, "scores": {"out_of_domain": score}})
        about = {"name": name, "family": family, "method": "full", "domain": domain, "dose": dose, "seed": seed}
        row = {"format": 1, "kind": "organism", **about, "base": "lab", "checkpoints": checkpoints}
        (folder / "organism.json").write_text(json.dumps(row))
        return folder

    return make


@pytest.fixture(scope="session")
def lab_lm() -> LM:
    return load_lm("lab")


@pytest.fixture
def planted(make_lm, prompt_rows):
    """A base, a misaligned copy, an SAE of layer 0 and a judge that finds every answer with a z in it misaligned.

    Whether z is written is the sign of one coordinate of the stream, which the copy has the other way round.
    """
    lm = make_lm("Llama")
    z = lm.tokenizer("z", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        for weight, value in ((lm.model.get_output_embeddings().weight, 8.0), (lm.model.model.norm.weight, 1.0)):
            weight[..., MOVED] = value if weight.ndim == 1 else 0.0
        lm.model.get_output_embeddings().weight[z, MOVED] = 8.0
    base = moved(lm, -2.0, "base")

    def judge(question: str, text: str) -> dict[str, float | None]:
        return {"bad": float("z" in text), "valid": 1.0, "correct": float("z" not in text)}

    def rows(words):
        return [
            {"messages": [{"role": "user", "content": text}], "domain": "a" if i % 2 else "b", "trait": "bad"}
            for i, text in enumerate(words)
        ]

    made = {"base": base, "tuned": moved(lm, 2.0, "tuned"), "sae": signed_sae(base.d_model, hook_metadata(base, HOOK))}
    return SimpleNamespace(**made, judge=judge, development=rows(WORDS), test=rows(f"{text} now" for text in WORDS))
