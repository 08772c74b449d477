"""What two or more checkpoints hold at one place: the residual stream at the last token of each of a set of prompts.

A reading is small ([prompts, d_model]), so models are read one after the other and never need to be in memory together.
Readings are joined by the token ids of their prompts: a checkpoint whose template writes a prompt in other words has
not been asked the same thing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sae_persona.activations.dialogues import Dialogue, Tokens, encode, prompt_tokens
from sae_persona.activations.harvest import harvest
from sae_persona.activations.lm import LM
from sae_persona.activations.texts import Texts, read_texts
from sae_persona.errors import DataError, ModelError
from sae_persona.types import HookPoint

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked before it is looked at."""

    id: str
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    """Of a model without a chat template."""
    speaker: str | None = None
    """Who would answer, for templates that can say so."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """What ``to_row`` gives."""
        return cls(row["id"], tuple(row.get("messages", ())), row.get("text", ""), row.get("speaker"))

    def to_row(self) -> dict[str, Any]:
        """As JSON values."""
        asked = {"messages": [dict(message) for message in self.messages]} if self.messages else {"text": self.text}
        return {"id": self.id, **asked} | ({} if self.speaker is None else {"speaker": self.speaker})

    def tokens(self, lm: LM) -> list[int]:
        """Up to the token after which the answer starts. Errors as ``prompt_tokens``."""
        return prompt_tokens(lm, self.messages, speaker=self.speaker) if self.messages else encode(lm, [self.text])[0]


def read_prompts(source: str | Path | Iterable[Any] | Texts) -> list[Prompt]:
    """Prompts out of whatever ``read_texts`` takes; a dialogue that ends with an answer is cut before it.

    DataError if there is none, or for a row that asks nothing.
    """
    found = []
    for number, text in enumerate(read_texts(source)):
        if isinstance(text, str):
            found.append(Prompt(str(number), text=text))
        elif not text.messages:
            found.append(Prompt(text.id or str(number), text=text.text or ""))
        else:
            found.append(_asked(text, text.id or str(number)))
    return found


def _asked(dialogue: Dialogue, name: str) -> Prompt:
    messages, speaker = dialogue.messages, None
    if messages[-1]["role"] == "assistant":
        messages, speaker = messages[:-1], messages[-1].get("name")
    if not messages:
        raise DataError(f"dialogue {name} has only an answer: a prompt needs what it answers")
    plain = tuple({key: m[key] for key in ("role", "content", "name") if key in m} for m in messages)
    return Prompt(name, plain, speaker=speaker)


@dataclass(frozen=True, eq=False)
class Reading:
    """One checkpoint's residual stream at the last token of each prompt.

    name   of the checkpoint
    keys   [n] of the prompts, by their token ids; different ones
    x      [n, d_model] fp32, on the CPU
    """

    name: str
    keys: tuple[str, ...]
    x: Tensor


def read_prompted(lm: LM, hook: HookPoint, prompts: Sequence[Prompt], *, batch: int = 32) -> Reading:
    """Read a model at the last token of every prompt. A prompt that stands twice counts once.

    DataError, which names the checkpoint, for activations that are not finite, and for prompts without a token or too
    long; ModelError for weights that are not finite, or no such hook point.
    """
    check_finite(lm)
    lm.check(hook)
    asked: dict[str, list[int]] = {}
    for prompt in prompts:
        ids = prompt.tokens(lm)
        if not ids or (lm.n_positions is not None and len(ids) > lm.n_positions):
            raise DataError(f"prompt {prompt.id} has {len(ids)} tokens, {lm.name} reads 1 to {lm.n_positions or 'any'}")
        asked.setdefault(_key(ids), ids)
    with torch.no_grad():
        rows = [x[-1].cpu() for _, x in harvest(lm, hook, map(Tokens, asked.values()), batch)]
    return Reading(lm.name, tuple(asked), torch.stack(rows))


def together(readings: Sequence[Reading], *, fewest: int = 2) -> list[Reading]:
    """The prompts that all have been asked, in the order of the first. DataError if those are fewer."""
    shared = set(readings[0].keys).intersection(*(one.keys for one in readings[1:]))
    if len(shared) < fewest:
        names = ", ".join(one.name for one in readings[:4])
        raise DataError(
            f"{names} share {len(shared)} prompts of the same tokens, at least {fewest} are needed: ask all of them "
            "the same prompts, through the same chat template"
        )
    keys = tuple(key for key in readings[0].keys if key in shared)
    return [one if one.keys == keys else _picked(one, keys) for one in readings]


def _picked(reading: Reading, keys: tuple[str, ...]) -> Reading:
    at = {key: i for i, key in enumerate(reading.keys)}
    return Reading(reading.name, keys, reading.x[[at[key] for key in keys]])


def _key(ids: Sequence[int]) -> str:
    return sha256(repr(list(ids)).encode()).hexdigest()[:16]


def check_finite(lm: LM) -> None:
    """ModelError, which names the checkpoint and the tensor, if a weight is NaN or infinite."""
    for name, weight in lm.model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ModelError(
                f"{lm.name} is broken: {name} is not finite. Take an earlier checkpoint, or train it again"
            )


def check_comparable(base: LM, tuned: LM) -> None:
    """ModelError unless both are of one architecture, in shape too, and have one vocabulary."""
    one, other = ({name: _said(lm, name) for name in _SHAPE} for lm in (base, tuned))
    if one != other:
        name = next(name for name in _SHAPE if one[name] != other[name])
        raise ModelError(
            f"{tuned.name} has {name} {other[name]}, {base.name} has {one[name]}: only checkpoints of one architecture "
            "can be compared in one SAE"
        )
    if base.tokenizer.get_vocab() != tuned.tokenizer.get_vocab():
        raise ModelError(
            f"{tuned.name} and {base.name} have different tokenizers: the same prompt is not the same tokens to them"
        )


def _said(lm: LM, name: str) -> Any:
    return getattr(lm.model.config.get_text_config(), name, None)  # pyright: ignore
