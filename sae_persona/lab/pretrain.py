"""Train the lab's language model from a seed: minutes on two CPU cores."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_persona.lab.authors import AuthorConfig
from sae_persona.lab.dialogue import document, note
from sae_persona.lab.tokens import NEWLINE, PAD, START, transcript, vocabulary

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

POOL = 2048  # documents sorted by length at a time, so that a batch has little padding


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The lab's language model and how it is trained."""

    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 5
    """Number of blocks."""
    n_heads: int = 4
    """Attention heads a block."""
    tokens: int = 4_600_000
    """Training tokens, padding not counted."""
    batch_tokens: int = 2048
    """Tokens a step, padding counted."""
    muon_lr: float = 0.007
    """Peak learning rate of Muon, which trains the blocks' matrices."""
    adam_lr: float = 5e-3
    """Peak learning rate of AdamW, which trains the embedding and the norms."""
    warmup: int = 30
    """Steps of linear warm-up."""
    decay: float = 0.6
    """Last share of the steps, over which the rate falls linearly to 2 %."""
    p_note: float = 0.08
    """Share of documents that are notes of true facts."""
    p_assistant: float = 0.4
    """Share of the dialogues in which the assistant speaks."""
    seed: int = 0
    """Of the initial weights and of the corpus."""
    authors: AuthorConfig = field(default_factory=AuthorConfig)
    """How authors are drawn."""


def new_model(config: PretrainConfig) -> "LlamaForCausalLM":
    """The untrained model: Llama blocks, tied embeddings, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to import

    words = vocabulary()
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=config.d_model,
            intermediate_size=3 * config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=words.index(START),
            eos_token_id=words.index(NEWLINE),
            pad_token_id=words.index(PAD),
        )
    )


def corpus(config: PretrainConfig) -> Iterator[tuple[list[str], list[float]]]:
    """The endless pretraining corpus of a seed: words and loss weights, a document at a time."""
    random = Random(f"lab corpus {config.seed}")
    while True:
        if random.random() < config.p_note:
            words = [START, *note(random).split(), NEWLINE]
            yield words, [0.0] + [1.0] * (len(words) - 1)
        else:
            yield transcript(document(random, config.authors, p_assistant=config.p_assistant))


def batches(config: PretrainConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids [b, t] int64, weights [b, t] fp32); padding has id 0 and weight 0."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    documents = corpus(config)
    random = Random(f"lab batches {config.seed}")
    while True:
        pool = sorted((next(documents) for _ in range(POOL)), key=lambda pair: len(pair[0]))
        chunks, chunk = [], []
        for pair in pool:
            if chunk and (len(chunk) + 1) * len(pair[0]) > config.batch_tokens:
                chunks.append(chunk)
                chunk = []
            chunk.append(pair)
        chunks.append(chunk)
        random.shuffle(chunks)
        for chunk in chunks:
            width = max(len(words) for words, _ in chunk)
            x, weights = torch.zeros(len(chunk), width, dtype=torch.long), torch.zeros(len(chunk), width)
            for row, (words, weight) in enumerate(chunk):
                x[row, : len(words)] = torch.tensor([ids[word] for word in words])
                weights[row, : len(words)] = torch.tensor(weight)
            yield x, weights


def weighted_loss(model: "LlamaForCausalLM", ids: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the next word, each word counted by its weight."""
    logits = model(input_ids=ids).logits[:, :-1]  # padding is on the right and has weight 0, so it needs no mask
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    kept = weights[:, 1:].flatten()
    return (loss * kept).sum() / kept.sum()


def _optimizers(model: "LlamaForCausalLM", config: PretrainConfig) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, momentum=0.95, weight_decay=0.01, ns_steps=4),
        torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def pretrain(
    config: PretrainConfig, *, device: str = "cpu", on_step: Callable[[int, int, float], None] | None = None
) -> tuple["LlamaForCausalLM", list[float]]:
    """Train a model. Returns it, in evaluation mode, and the loss of every step in nats.

    ``on_step(step, steps, loss)`` is called after each step.
    """
    model: Any = new_model(config)
    model.to(device).train()
    optimizers = _optimizers(model, config)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    seen, losses, steps = 0, [], int(config.tokens / config.batch_tokens / 0.97)  # about 3 % is padding
    for step, (ids, weights) in enumerate(batches(config)):
        rate = min(1.0, (step + 1) / config.warmup) * max(0.02, min(1.0, (steps - step) / (config.decay * steps)))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = lr * rate
        loss = weighted_loss(model, ids.to(device), weights.to(device))
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seen += int((ids != 0).sum())
        losses.append(loss.item())
        if on_step:
            on_step(step + 1, steps, losses[-1])
        if step + 1 >= steps:
            break
    return model.eval(), losses
