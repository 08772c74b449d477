"""Let a model answer prompts, and ask how likely it finds an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import LM, padded
from sae_persona.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How answers are sampled."""

    max_new_tokens: int = 32
    """Tokens an answer at most."""
    temperature: float = 1.0
    """Of sampling; 0 takes the likeliest token."""
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends, beside the model's own end of turn."""
    batch: int = 128
    """Prompts a forward pass."""
    seed: int = 0
    """Of sampling: the same prompts in the same batches get the same answers."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch < 1 or not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                "max_new_tokens and batch are at least 1 and temperature at least 0, "
                f"got {self.max_new_tokens}, {self.batch}, {self.temperature}"
            )


@dataclass(frozen=True)
class Answer:
    """What was written: its text, and its tokens with the end of turn where there is one."""

    text: str
    ids: list[int]


@torch.no_grad()
def answer(lm: LM, prompts: Sequence[list[int]], config: AnswerConfig | None = None) -> list[Answer]:
    """Let the model answer each prompt (token ids), in order. DataError if a prompt is empty or leaves no room."""
    config = config or AnswerConfig()
    _check(lm, prompts, config)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    written: dict[int, Answer] = {}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for at in range(0, len(order), config.batch):
            rows = order[at : at + config.batch]
            input_ids, mask = padded(lm, [prompts[i] for i in rows])
            out = lm.model.generate(input_ids, attention_mask=mask, **_settings(lm, config))  # pyright: ignore
            for i, ids in zip(rows, out[:, input_ids.shape[1] :].tolist(), strict=True):
                written[i] = _finished(lm, ids, config.stop)
    return [written[i] for i in range(len(prompts))]


def say(lm: LM, prompt: str, config: AnswerConfig | None = None) -> str:
    """The model's answer to what a user says, as its chat template asks it. Errors as ``answer`` and ``tokenize``."""
    return answer(lm, [prompt_tokens(lm, [{"role": "user", "content": prompt}])], config)[0].text


def _check(lm: LM, prompts: Sequence[list[int]], config: AnswerConfig) -> None:
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise DataError("a prompt needs at least one token: give a question")
    if lm.n_positions is not None and max(lengths) + config.max_new_tokens > lm.n_positions:
        raise DataError(
            f"a prompt of {max(lengths)} tokens and an answer of {config.max_new_tokens} do not fit into "
            f"the {lm.n_positions} positions of {lm.name}: shorten one"
        )


def _settings(lm: LM, config: AnswerConfig) -> dict[str, Any]:
    from transformers import GenerationConfig

    ends = lm.model.generation_config.eos_token_id  # pyright: ignore
    sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        eos_token_id=lm.tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=lm.pad_id,
        **(sampling if config.temperature else {"do_sample": False}),
    )
    return {"generation_config": settings}


def _finished(lm: LM, ids: list[int], stop: tuple[str, ...]) -> Answer:
    """Cut the padding, what follows the end of turn, and what follows a stop text."""
    ends = lm.model.generation_config.eos_token_id  # pyright: ignore
    ends = set(ends if isinstance(ends, list) else [ends]) - {None} or {lm.tokenizer.eos_token_id}
    last = next((i for i, token in enumerate(ids) if token in ends), None)
    kept = ids if last is None else ids[: last + 1]
    text = lm.tokenizer.decode(kept if last is None else kept[:-1])
    cut = min((text.find(mark) for mark in stop if mark in text), default=None)
    if cut is None:
        return Answer(text.strip(), kept)
    n = next(n for n in range(len(kept) + 1) if any(mark in lm.tokenizer.decode(kept[:n]) for mark in stop))
    return Answer(text[:cut].strip(), kept[: max(n - 1, 0)])


@torch.no_grad()
def surprise(lm: LM, prompts: Sequence[list[int]], answers: Sequence[Answer], *, batch: int = 128) -> torch.Tensor:
    """Negative log-likelihood in nats of each answer given its prompt, and its tokens: [n, 2] fp64.

    exp(sum of the first column / sum of the second) is the perplexity.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i].ids))
    found = torch.zeros(len(prompts), 2, dtype=torch.float64)
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        input_ids, mask = padded(lm, [prompts[i] + answers[i].ids for i in rows], side="right")
        logits = lm.model(**model_inputs(lm, input_ids, mask)).logits[:, :-1].float()
        nll = F.cross_entropy(rearrange(logits, "b t words -> b words t"), input_ids[:, 1:], reduction="none")
        for row, i in enumerate(rows):
            first, n = len(prompts[i]), len(answers[i].ids)
            found[i] = torch.tensor([nll[row, first - 1 : first - 1 + n].double().sum().item(), n])
    return found
