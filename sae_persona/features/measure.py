"""Read a corpus once: what every latent does, and what each labelled answer looks like."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch
from scipy import sparse

from sae_persona.activations.dialogues import Dialogue, Tokens, tokenize
from sae_persona.activations.harvest import harvest
from sae_persona.activations.lm import LM
from sae_persona.activations.sequences import Which, kept
from sae_persona.activations.texts import Texts, read_texts
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.contexts import TopContexts
from sae_persona.features.examples import Examples, Ids, ReadText
from sae_persona.features.files import reading_h5, write_h5
from sae_persona.features.firings import Firings, Piece, TokenRows
from sae_persona.features.pooled import Pooled, check_fingerprint, to_csr
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
    """Labelled answers and spans that began beyond ``context_size``, or had no token, or none before them."""
    sae: str = ""
    """Fingerprint of the SAE that it is of; "" if of none."""

    def save(self, run: Run) -> None:
        """Write ``latents.h5`` and ``examples.h5`` into a run folder."""

        def fill(file) -> None:
            file.attrs["sae"] = self.sae
            self.stats.to_h5(file.create_group("stats"))
            self.contexts.to_h5(file.create_group("contexts"))

        write_h5(run.latents, "latents", fill)
        self.pooled.save(run.examples)

    @classmethod
    def load(cls, run: Run, sae: SAE | None = None) -> Self:
        """Read both files. FormatError if one is missing, cut short or of another format; DataError if they are of
        two SAEs, or of another than ``sae``."""
        with reading_h5(run.latents, "latents") as file:
            stats, contexts = LatentStats.from_h5(file["stats"]), TopContexts.from_h5(file["contexts"])
            measured = file.attrs["sae"]
        pooled = Pooled.load(run.examples)
        if pooled.sae != measured:
            raise DataError(f"{run.latents} and {run.examples.name} are of different SAEs: measure the run again")
        if sae is not None:
            check_fingerprint(measured, sae)
        return cls(stats, contexts, pooled, sae=measured)


def check_measured(run: Run, sae: SAE) -> None:
    """DataError if the run was measured with another SAE; FormatError as in ``Measurement.load``."""
    with reading_h5(run.latents, "latents") as file:
        check_fingerprint(file.attrs["sae"], sae)


@torch.no_grad()
def measure(lm: LM, hook: HookPoint, sae: SAE, texts: Source, config: MeasureConfig | None = None) -> Measurement:
    """Run the language model and the SAE over ``texts`` (whatever ``read_texts`` takes) once.

    Every labelled answer becomes an example; texts without labels count in the statistics only. A dialogue without a
    split is put in one by its id (or its number), half and half, the same one every time.
    DataError if an id stands twice or there is no token at all, ModelError if the hook point does not exist,
    ConfigError if the model does not take so long a context; an SAE of another width is refused as ``check_width``
    does.
    """
    config = config or MeasureConfig()
    lm.check(hook)
    if lm.n_positions is not None and config.context_size > lm.n_positions:
        raise ConfigError(f"context_size {config.context_size} is more than {lm.name} takes: {lm.n_positions}")
    sae.check_width(lm.d_model)
    stats, contexts, examples = LatentStats(sae.n_latents), TopContexts(sae.n_latents, config.contexts), Examples()
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
    pooled = examples.pooled(sae.n_latents, sae.d_in, sae.fingerprint)
    return Measurement(stats, contexts, pooled, dropped, pooled.sae)


def _harvested(lm: LM, hook: HookPoint, texts: Source, config: MeasureConfig) -> Iterator[ReadText]:
    waiting: deque[tuple[int, str | Dialogue]] = deque()

    def tokens() -> Iterator[Tokens]:
        ids = Ids()
        for number, source in enumerate(read_texts(texts)):
            ids.add(source, number)
            found = tokenize(lm, source, context_size=config.context_size)
            if found.ids:
                waiting.append((number, source))
                yield found

    for found, x in harvest(lm, hook, tokens(), config.lm_batch):
        yield ReadText(*waiting.popleft(), found, x)


def _batches(texts: Iterable[ReadText], size: int) -> Iterator[list[ReadText]]:
    source = iter(texts)
    while batch := list(islice(source, size)):
        yield batch


def _from_csr(matrix: sparse.csr_matrix) -> SparseLatents:
    parts = matrix.data, matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    return SparseLatents(*(torch.from_numpy(part) for part in parts))
