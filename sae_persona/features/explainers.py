"""Who writes the explanations: anything that answers a chat, by name or over HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import LM, load_lm
from sae_persona.errors import ConfigError, DataError

Messages = Sequence[dict[str, str]]


class ExplainerError(Exception):
    """No answer, or none that can be used: of one latent, which is marked, while the others go on."""


class Explainer(Protocol):
    """Answers a chat. ``complete`` may be called from several threads; ExplainerError if there is no answer."""

    @property
    def name(self) -> str:
        """What is written beside each explanation, and answers are kept under: the model, as it was asked for."""
        ...

    def complete(self, messages: Messages) -> str: ...


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """How an explainer is asked."""

    answer_tokens: int = 300
    """Tokens an answer at most."""
    timeout: float = 60.0
    """Seconds that an endpoint may take for an answer."""
    attempts: int = 3
    """Times that a request is sent: again after no connection, a timeout, status 429 or 5xx."""
    backoff: float = 1.0
    """Seconds before the second attempt, doubled before each one after it; an endpoint may ask for more."""

    def __post_init__(self) -> None:
        if min(self.answer_tokens, self.attempts) < 1:
            raise ConfigError(f"answer_tokens and attempts are at least 1, got {self.answer_tokens}, {self.attempts}")
        if not 0 < self.timeout < float("inf") or not 0 <= self.backoff < float("inf"):
            raise ConfigError(f"timeout is above 0 and backoff at least 0, got {self.timeout}, {self.backoff}")


def open_explainer(text: str, config: AskConfig | None = None, *, device: str = "cpu") -> Explainer:
    """The explainer that ``openai:MODEL@URL`` or ``hf:MODEL`` names.

    URL is where ``/chat/completions`` is put behind, such as http://127.0.0.1:8000/v1; a key is taken from the
    environment, OPENAI_API_KEY. MODEL of hf: is a folder, hub id or lab, as `load_lm` takes it, with a chat template.
    ConfigError for another text, ModelError if the model cannot be loaded.
    """
    from sae_persona.features.chat_endpoint import ChatEndpoint  # here, because it imports from this module

    config = config or AskConfig()
    kind, _, rest = text.partition(":")
    model, _, url = rest.rpartition("@")
    if kind == "openai" and model and url:
        return ChatEndpoint(model, url, config)
    if kind == "hf" and rest:
        return LocalChat(load_lm(rest, device=device), config)
    raise ConfigError(f"an explainer reads openai:MODEL@URL or hf:MODEL, got {text!r}")


class LocalChat:
    """A Hugging Face chat model in this process: the likeliest token each time, one chat after the other."""

    def __init__(self, lm: LM, config: AskConfig | None = None) -> None:
        self.lm = lm
        self.config = config or AskConfig()
        self._lock = Lock()
        prompt_tokens(lm, [{"role": "user", "content": "a"}])  # a model without a chat template is refused here

    @property
    def name(self) -> str:
        return f"hf:{self.lm.name}"

    @torch.no_grad()
    def complete(self, messages: Messages) -> str:
        """The model's answer. ExplainerError if its template refuses the chat, or it is too long for the model."""
        lm, n_new = self.lm, self.config.answer_tokens
        try:
            ids = prompt_tokens(lm, messages)
        except DataError as error:
            raise ExplainerError(str(error)) from error
        if lm.n_positions is not None and len(ids) + n_new > lm.n_positions:
            raise ExplainerError(
                f"a prompt of {len(ids)} tokens and an answer of {n_new} do not fit into {lm.n_positions} positions"
            )
        given = torch.tensor([ids], device=lm.device)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": lm.pad_id}
        ends = lm.model.generation_config.eos_token_id  # pyright: ignore
        with self._lock:
            out = lm.model.generate(  # pyright: ignore[reportCallIssue]
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=n_new,
                eos_token_id=lm.tokenizer.eos_token_id if ends is None else ends,
                **greedy,
            )
        return lm.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
