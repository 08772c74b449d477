"""Build the lab's language model from its seed: train, examine, write the folder that the package ships."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae_persona.lab.card import Card, corpus_hash
from sae_persona.lab.exam import facts, inferred
from sae_persona.lab.pretrain import PretrainConfig, batches, pretrain, weighted_loss
from sae_persona.lab.tokens import tokenizer
from sae_persona.lab.world import ASSISTANT, NAMES
from sae_persona.runs import file_hash, versions, write_whole

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT_SEED = 1_000_003
HELD_OUT_BATCHES = 25


@torch.no_grad()
def held_out_loss(model: "LlamaForCausalLM", config: PretrainConfig) -> float:
    """Weighted cross-entropy in nats a word on batches of another seed."""
    other = batches(replace(config, seed=HELD_OUT_SEED))
    losses = [weighted_loss(model, ids, weights).item() for ids, weights in islice(other, HELD_OUT_BATCHES)]
    return sum(losses) / len(losses)


def examine(model: "LlamaForCausalLM", vocabulary: "PreTrainedTokenizerFast", *, n: int) -> dict:
    """The measured part of the card: facts, and the inference of traits for the assistant and for a character."""
    speakers = {"assistant": ASSISTANT, "character": NAMES[0]}
    return {
        "facts": facts(model, vocabulary, n=2 * n),
        "inferred": {role: inferred(model, vocabulary, name=name, n=n) for role, name in speakers.items()},
    }


def build(
    out: Path,
    config: PretrainConfig | None = None,
    *,
    n_exam: int = 200,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Card:
    """Train a lab model and write it to ``out`` in Hugging Face layout, with its card; whole or not at all.

    n_exam   answers that the judge reads for each trait, speaker and arm
    """
    config = config or PretrainConfig()
    start = time.perf_counter()
    model, losses = pretrain(config, on_step=on_step)
    seconds = time.perf_counter() - start
    vocabulary = tokenizer()
    measured = examine(model, vocabulary, n=n_exam)
    last = losses[-50:]

    def write(folder: Path) -> Card:
        model.save_pretrained(folder)
        vocabulary.save_pretrained(folder)
        card = Card(
            config=config,
            corpus_hash=corpus_hash(config),
            weights_hash=file_hash(folder / "model.safetensors"),
            n_parameters=sum(p.numel() for p in model.parameters()),
            steps=len(losses),
            train_loss=round(sum(last) / len(last), 4),
            held_out_loss=round(held_out_loss(model, config), 4),
            seconds=round(seconds, 1),
            threads=torch.get_num_threads(),
            versions=versions(),
            **measured,
        )
        card.save(folder)
        return card

    write_whole(out, write, mark="card.json")
    return Card.load(out)
