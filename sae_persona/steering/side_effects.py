"""What an edit costs on texts that it is not meant for: cross entropy with it minus without."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import LM, padded
from sae_persona.activations.sequences import Place
from sae_persona.activations.sequences import placed as placed_sequences
from sae_persona.activations.texts import Texts, read_texts
from sae_persona.attribution.association import Interval
from sae_persona.errors import ConfigError, DataError
from sae_persona.steering.apply import SAEs, intervene
from sae_persona.steering.interventions import Edit, Placed
from sae_persona.steering.positions import Positions, Spans
from sae_persona.steering.strength import resampled
from sae_persona.types import HookPoint


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Which held-out texts are read."""

    context_size: int = 128
    """Tokens a sequence, at most."""
    n_sequences: int = 128
    """Sequences at most, the first of the texts."""
    batch: int = 32
    """Sequences a forward pass."""

    def __post_init__(self) -> None:
        if self.context_size < 2 or self.n_sequences < 1 or self.batch < 1:
            raise ConfigError(
                "context_size is at least 2, n_sequences and batch at least 1, "
                f"got {self.context_size}, {self.n_sequences} and {self.batch}"
            )


class HeldOut:
    """Held-out texts with the unsteered model's cross entropy on each. Made once, read for many edits.

    DataError if no text has a token with one before it to predict it from.
    """

    def __init__(self, lm: LM, texts: str | Path | Sequence[Any] | Texts, config: HeldOutConfig | None = None) -> None:
        self.lm, self.config = lm, config or HeldOutConfig()
        self._ids: list[list[int]] = []
        text_of: list[int] = []
        for place, tokens in placed_sequences(lm, read_texts(texts), self.config.context_size, "all", Place()):
            if len(self._ids) == self.config.n_sequences:
                break
            if len(tokens.ids) > 1:
                self._ids.append(tokens.ids)
                text_of.append(place.text)
        if not self._ids:
            raise DataError("no held-out text has two tokens: give longer texts")
        self._text_of = np.array(text_of)
        self._n = np.array([len(ids) - 1 for ids in self._ids], np.float64)
        self._base = self._nats()

    @property
    def n_tokens(self) -> int:
        return int(self._n.sum())

    @property
    def ce(self) -> float:
        """The unsteered model's, in nats a token."""
        return float(self._base.sum() / self._n.sum())

    def cost(
        self,
        saes: SAEs,
        edits: Sequence[Edit | Placed],
        *,
        hook: HookPoint | None = None,
        positions: Positions | Spans = "all",
        seed: int = 0,
    ) -> Interval:
        """Cross entropy with the edits minus without, in nats a token, with a paired bootstrap interval over texts.

        positions   of edits that are not Placed. By default every token but BOS is edited: the texts have no answers,
                    and an edit that stays on is what a user may forget

        DataError if the steered model's logits are not finite.
        """
        with intervene(self.lm, saes, edits, hook=hook, positions=positions):
            more = self._nats() - self._base
        if not np.isfinite(more).all():
            raise DataError("the logits under the edits are not finite on held-out text: lower the strength")
        totals, n = resampled(np.stack([more, self._n], axis=1), self._text_of, seed).T
        return Interval(float(more.sum() / self._n.sum()), *np.percentile(totals / n, [2.5, 97.5]).tolist())

    @torch.no_grad()
    def _nats(self) -> np.ndarray:
        """Negative log-likelihood of each sequence after its first token: [sequences] fp64."""
        found = np.zeros(len(self._ids))
        order = sorted(range(len(self._ids)), key=lambda i: len(self._ids[i]))
        for at in range(0, len(order), self.config.batch):
            rows = order[at : at + self.config.batch]
            input_ids, mask = padded(self.lm, [self._ids[i] for i in rows], side="right")
            logits = self.lm.model(**model_inputs(self.lm, input_ids, mask)).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
            found[rows] = (nll.double() * mask[:, 1:]).sum(dim=1).cpu().numpy()
        return found
