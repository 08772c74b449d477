"""Read a corpus once: what every latent does, and what each labelled answer looks like."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_persona.activations.dialogues import AnswerSpan, Dialogue, Tokens, tokenize
from sae_persona.activations.harvest import harvest
from sae_persona.activations.lm import LM
from sae_persona.activations.sequences import Which, kept
from sae_persona.activations.texts import Texts, read_texts
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.contexts import TopContexts
from sae_persona.features.files import reading_h5, write_h5
from sae_persona.features.firings import Firings, Piece, TokenRows
from sae_persona.features.pooled import POOLS, Pool, Pooled, pool, to_csr
from sae_persona.features.stats import LatentStats
from sae_persona.runs import Run
from sae_persona.sae.model import SAE
from sae_persona.types import HookPoint, SparseLatents

Source = str | Path | Iterable[Any] | Texts


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How a corpus is read."""

    context_size: int = 128
    """Tokens of a text that are read; what is longer is cut at the right."""
    lm_batch: int = 32
    """Texts in one forward pass, and in one call of the SAE."""
    tokens: Which = "all"
    """What statistics and contexts count: every token, or each answer and the token before it. Never BOS."""
    contexts: int = 8
    """Top contexts kept for a latent."""

    def __post_init__(self) -> None:
        if min(self.context_size, self.lm_batch, self.contexts) < 1:
            got = f"{self.context_size}, {self.lm_batch}, {self.contexts}"
            raise ConfigError(f"context_size, lm_batch and contexts are at least 1, got {got}")
        if self.tokens not in get_args(Which):
            raise ConfigError(f"tokens is one of {', '.join(get_args(Which))}, got {self.tokens!r}")


@dataclass
class Measurement:
    """What one pass over a corpus found."""

    stats: LatentStats
    contexts: TopContexts
    pooled: Pooled
    dropped: int = 0
    """Labelled answers that began beyond ``context_size``, or had no token."""

    def save(self, run: Run) -> None:
        """Write ``latents.h5`` and ``examples.h5`` into a run folder."""

        def fill(file) -> None:
            self.stats.to_h5(file.create_group("stats"))
            self.contexts.to_h5(file.create_group("contexts"))

        write_h5(run.latents, "latents", fill)
        self.pooled.save(run.examples)

    @classmethod
    def load(cls, run: Run) -> Self:
        """Read both files. FormatError if one is missing, cut short or of another format."""
        with reading_h5(run.latents, "latents") as file:
            stats, contexts = LatentStats.from_h5(file["stats"]), TopContexts.from_h5(file["contexts"])
        return cls(stats, contexts, Pooled.load(run.examples))


@dataclass(frozen=True)
class _Text:
    """A text on its way through: its number in the source, its tokens and, once harvested, [t, d_in]."""

    number: int
    source: str | Dialogue
    tokens: Tokens
    x: Tensor

    @property
    def answers(self) -> list[tuple[int, AnswerSpan]]:
        """The labelled answers that have tokens, with their number in the dialogue."""
        return [(n, span) for n, span in enumerate(self.tokens.answers) if span.labels and span.stop > span.start]

    @property
    def n_dropped(self) -> int:
        """Labelled answers of the source that are not among its tokens."""
        if not isinstance(self.source, Dialogue):
            return 0
        last = next((m for m in reversed(self.source.messages) if m["role"] == "assistant"), {})
        in_messages = sum(bool(m.get("labels")) for m in self.source.messages)
        return in_messages + (bool(self.source.labels) and not last.get("labels")) - len(self.answers)


@dataclass
class _Examples:
    """Rows of Pooled, while they come in."""

    facts: list[tuple] = field(default_factory=list)
    labels: list[dict[str, float]] = field(default_factory=list)
    pools: dict[Pool, list[sparse.csr_matrix]] = field(default_factory=lambda: {name: [] for name in POOLS})
    dense: dict[str, list[Tensor]] = field(default_factory=lambda: {"pre": [], "mean": []})

    def add(self, texts: list[_Text], x: Tensor, latents: sparse.csr_matrix) -> None:
        """Pool the labelled answers of texts whose tokens are the rows of ``x`` and ``latents``."""
        pre, spans = [], []
        for text, offset in zip(texts, _starts(texts), strict=False):
            for number, span in text.answers:
                pre.append(offset + span.pre)
                spans.append((offset + span.start, offset + span.stop))
                self.labels.append(dict(span.labels or {}))
                self.facts.append((*_facts(text, number), text.number, span.stop - span.start))
        if not spans:
            return
        for name, matrix in pool(latents, pre, spans).items():
            self.pools[name].append(matrix)
        self.dense["pre"].append(x[pre].float().cpu())
        self.dense["mean"].append(torch.stack([x[start:stop].float().mean(0) for start, stop in spans]).cpu())

    def pooled(self, n_latents: int, d_in: int) -> Pooled:
        personas = tuple(sorted({name for labels in self.labels for name in labels}))
        values = [[labels.get(name, np.nan) for name in personas] for labels in self.labels]
        columns = [np.array(column) for column in zip(*self.facts, strict=True)] or [np.empty(0, str)] * 7
        ids, template, domain, author, split, dialogue, length = columns
        nothing = sparse.csr_matrix((0, n_latents), dtype=np.float32)
        return Pooled(
            personas=personas,
            labels=np.array(values, np.float32).reshape(len(self.labels), len(personas)),
            ids=ids,
            template=template,
            domain=domain,
            author=author,
            split=split,
            dialogue=dialogue.astype(np.int64),
            n_answer_tokens=length.astype(np.int64),
            pools={name: sparse.csr_matrix(sparse.vstack([nothing, *parts])) for name, parts in self.pools.items()},
            dense={name: torch.cat([torch.empty(0, d_in), *parts]).numpy() for name, parts in self.dense.items()},
        )


@torch.no_grad()
def measure(lm: LM, hook: HookPoint, sae: SAE, texts: Source, config: MeasureConfig | None = None) -> Measurement:
    """Run the language model and the SAE over ``texts`` (whatever ``read_texts`` takes) once.

    Every labelled answer becomes an example; texts without labels count in the statistics only. A dialogue without a
    split is put in one by its id (or its number), half and half, the same one every time.
    DataError if there is no token at all, ModelError if the hook point does not exist, ConfigError if the model does
    not take so long a context; an SAE of another width is refused as ``check_width`` does.
    """
    config = config or MeasureConfig()
    lm.check(hook)
    if lm.n_positions is not None and config.context_size > lm.n_positions:
        raise ConfigError(f"context_size {config.context_size} is more than {lm.name} takes: {lm.n_positions}")
    sae.check_width(lm.d_model)
    stats, contexts, examples = LatentStats(sae.n_latents), TopContexts(sae.n_latents, config.contexts), _Examples()
    dropped = 0
    for batch in _batches(_harvested(lm, hook, texts, config), config.lm_batch):
        x = torch.cat([text.x for text in batch])
        latents = to_csr(sae.encode(x), sae.n_latents)
        examples.add(batch, x, latents)
        dropped += sum(text.n_dropped for text in batch)
        counted = TokenRows.of(
            [Piece(text.number, 0, text.tokens.ids, kept(lm, text.tokens, config.tokens)) for text in batch]
        )
        firings = Firings.of(counted, _from_csr(latents[counted.at.numpy()]), sae.n_latents)
        stats.add(firings.acts, firings.latent, counted.n)
        contexts.update(firings)
    if not stats.n_tokens:
        raise DataError(
            f"no {'answer' if config.tokens == 'answers' else 'text'} with a token in it: nothing to measure"
        )
    return Measurement(stats, contexts, examples.pooled(sae.n_latents, sae.d_in), dropped)


def _harvested(lm: LM, hook: HookPoint, texts: Source, config: MeasureConfig) -> Iterator[_Text]:
    waiting: deque[tuple[int, str | Dialogue]] = deque()

    def tokens() -> Iterator[Tokens]:
        for number, source in enumerate(read_texts(texts)):
            found = tokenize(lm, source, context_size=config.context_size)
            if found.ids:
                waiting.append((number, source))
                yield found

    for found, x in harvest(lm, hook, tokens(), config.lm_batch):
        yield _Text(*waiting.popleft(), found, x)


def _batches(texts: Iterable[_Text], size: int) -> Iterator[list[_Text]]:
    source = iter(texts)
    while batch := list(islice(source, size)):
        yield batch


def _starts(texts: list[_Text]) -> np.ndarray:
    return np.cumsum([0, *(len(text.tokens.ids) for text in texts)])


def _facts(text: _Text, answer: int) -> tuple[str, str, str, str, str]:
    """Id, template, domain, author and split of an example."""
    source = text.source if isinstance(text.source, Dialogue) else Dialogue()
    name = source.id or str(text.number)
    split = source.split or ("held_out" if sha256(name.encode()).digest()[0] % 2 else "train")
    return f"{name}:{answer}", source.template, source.domain, source.author, split


def _from_csr(matrix: sparse.csr_matrix) -> SparseLatents:
    parts = matrix.data, matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    return SparseLatents(*(torch.from_numpy(part) for part in parts))
