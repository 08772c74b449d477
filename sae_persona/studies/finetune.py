"""Fine-tune a language model on dialogues, all of it or through LoRA, and look at it on the way.

The loss is the mean cross-entropy of the tokens of every answer and of the token that ends it; nothing else is learned.
There is no dropout, and rows come in shuffled passes, so on one thread the seed decides every bit.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_persona.activations.dialogues import Dialogue, Tokens, tokenize
from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import LM, padded, wrap_lm
from sae_persona.errors import ConfigError, DataError, ModelError, RunError

Method = Literal["full", "lora"]
LEARNING_RATES: dict[Method, float] = {"full": 1e-4, "lora": 1e-3}
IGNORED = -100  # what cross_entropy leaves out
During = Callable[[LM], AbstractContextManager[Callable[[], Tensor] | None]]
"""Given the model that trains, what its forward passes run inside; the callable it gives, if any, is asked for a term
of the loss after each: that is how edits and penalties go into a fine-tune."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a model is fine-tuned."""

    method: Method = "full"
    """full trains every weight, lora low-rank additions to the blocks' matrices (needs peft)."""
    steps: int = 60
    """Optimizer steps."""
    batch: int = 32
    """Rows a step."""
    lr: float | None = None
    """Adam's learning rate, constant; by default 1e-4 in full and 1e-3 for LoRA."""
    rank: int = 4
    """Of LoRA; its scale alpha is twice that."""
    keep: tuple[int, ...] = (0, 4, 8, 16, 30)
    """Steps after which the model is looked at, 0 being before the first; beside the last, which always is."""
    seed: int = 0
    """Of the order of rows and of LoRA's initial weights."""

    def __post_init__(self) -> None:
        if self.method not in LEARNING_RATES:
            raise ConfigError(f"method is full or lora, got {self.method!r}")
        if min(self.steps, self.batch, self.rank) < 1 or min(self.keep, default=0) < 0:
            raise ConfigError(
                "steps, batch and rank are at least 1 and steps to keep at least 0, "
                f"got {self.steps}, {self.batch}, {self.rank}, {self.keep}"
            )
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError(f"lr is above 0, got {self.lr}")

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        return LEARNING_RATES[self.method] if self.lr is None else self.lr

    @property
    def looks(self) -> tuple[int, ...]:
        """The steps after which the model is looked at, in order."""
        return tuple(sorted({step for step in self.keep if step < self.steps} | {self.steps}))


@dataclass(frozen=True, eq=False)
class Look:
    """A model on its way through a fine-tune."""

    step: int
    lm: LM
    """Valid until the next step: save what is to stay."""
    adapter: Any = None
    """The PeftModel behind it, whose LoRA weights are merged in ``lm``."""


def finetune(
    lm: LM, rows: Sequence[Mapping[str, Any]], config: FinetuneConfig | None = None, *, during: During | None = None
) -> Iterator[tuple[int, LM]]:
    """Fine-tune a copy of ``lm`` on dialogues with answers; gives (step, model) at each of the steps to keep.

    Each model is valid until the next is asked for. Errors as ``looks``, before anything is trained.
    """
    found = looks(lm, rows, config, during=during)
    return ((look.step, look.lm) for look in found)


def looks(
    lm: LM, rows: Sequence[Mapping[str, Any]], config: FinetuneConfig | None = None, *, during: During | None = None
) -> Iterator[Look]:
    """As ``finetune``, with the adapter beside the model.

    DataError if a row has no answer or does not fit into the model; ModelError if it is not in fp32; RunError if peft
    is not there, or, while training, if the loss is no number.
    """
    config = config or FinetuneConfig()
    if lm.dtype != torch.float32:
        raise ModelError(f"a fine-tune needs weights in fp32, {lm.name} has {lm.dtype}: load it with dtype=float32")
    if config.method == "lora":
        _peft()
    return _train(lm, answered(lm, rows), config, during)


def answered(lm: LM, rows: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Of each row its token ids, and what is to be learned: the same with IGNORED outside answers and their ends."""
    if not rows:
        raise DataError("no rows to fine-tune on")
    found = []
    for number, row in enumerate(rows):
        tokens = tokenize(lm, Dialogue.from_row(row, f"row {number}"))
        if not tokens.answers:
            raise DataError(f"row {number} has no answer to learn: give messages of which one is the assistant's")
        if lm.n_positions is not None and len(tokens.ids) > lm.n_positions:
            raise DataError(
                f"row {number} has {len(tokens.ids)} tokens, {lm.name} takes {lm.n_positions}: leave it out"
            )
        found.append((tokens.ids, _targets(tokens)))
    return found


def _targets(tokens: Tokens) -> list[int]:
    learned = {t for span in tokens.answers for t in range(span.start, span.stop + 1)}
    return [token if t in learned else IGNORED for t, token in enumerate(tokens.ids)]


def batch_loss(lm: LM, batch: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Mean cross-entropy in nats a learned token, of what ``answered`` gives."""
    input_ids, mask = padded(lm, [ids for ids, _ in batch], side="right")
    width = input_ids.shape[1]
    targets = torch.tensor([line + [IGNORED] * (width - len(line)) for _, line in batch], device=lm.device)
    logits = lm.model(**model_inputs(lm, input_ids, mask)).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def mean_loss(lm: LM, rows: Sequence[Mapping[str, Any]], *, batch: int = 64) -> float:
    """Mean cross-entropy in nats over all tokens that are to be learned. Errors as ``looks``."""
    ready = sorted(answered(lm, rows), key=lambda row: len(row[0]))
    nats, tokens = 0.0, 0
    for at in range(0, len(ready), batch):
        part = ready[at : at + batch]
        n = sum(target != IGNORED for _, targets in part for target in targets)
        nats, tokens = nats + batch_loss(lm, part).item() * n, tokens + n
    return nats / tokens


def _passes(n: int, config: FinetuneConfig) -> Iterator[list[int]]:
    """Batches of row numbers, without end: pass after pass, each in an order of its own."""
    random, waiting = Random(f"finetune {config.seed}"), []
    while True:
        while len(waiting) < config.batch:
            waiting += random.sample(range(n), n)
        yield waiting[: config.batch]
        waiting = waiting[config.batch :]


def _train(
    lm: LM, rows: list[tuple[list[int], list[int]]], config: FinetuneConfig, during: During | None
) -> Iterator[Look]:
    model = copy.deepcopy(lm.model).requires_grad_(True)
    adapter = None
    if config.method == "lora":
        adapter = _with_lora(model, config)
    tuned = wrap_lm(model, lm.tokenizer, name=lm.name, blocks=lm.blocks_path)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=config.rate)
    batches = _passes(len(rows), config)
    if 0 in config.looks:
        yield _look(0, tuned, adapter)
    for step in range(1, config.steps + 1):
        with torch.enable_grad(), during(tuned) if during else nullcontext() as term:
            loss = batch_loss(tuned, [rows[i] for i in next(batches)])
            if term is not None:
                loss = loss + term()
            if not torch.isfinite(loss):
                raise RunError(
                    f"the loss is {loss.item()} at step {step}: lower lr, {config.rate:g}, or check the rows"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step in config.looks:
            yield _look(step, tuned, adapter)


def _look(step: int, tuned: LM, adapter: Any) -> Look:
    if adapter is None:
        return Look(step, tuned)
    merged = copy.deepcopy(adapter).merge_and_unload().requires_grad_(False)
    return Look(step, wrap_lm(merged, tuned.tokenizer, name=tuned.name, blocks=tuned.blocks_path), adapter)


def _peft() -> Any:
    try:
        import peft  # slow to import, and an extra
    except ImportError as error:
        raise RunError("LoRA needs peft: pip install 'sae-persona[export]', or choose method full") from error
    return peft


def _with_lora(model: Any, config: FinetuneConfig) -> Any:
    """Put trainable low-rank additions into the blocks of ``model`` itself; returns the PeftModel around it."""
    peft = _peft()
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft's
        torch.manual_seed(config.seed)
        return peft.get_peft_model(model.requires_grad_(False), settings)
