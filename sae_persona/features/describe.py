"""Describe latents without any explainer: the logit lens of their directions, and scores of what they read and do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.contexts import Context, TopContexts
from sae_persona.features.descriptions import Description
from sae_persona.features.input_scores import input_score, token_concentration
from sae_persona.features.logit_lens import LogitLens
from sae_persona.features.measure import Measurement
from sae_persona.features.output_scores import output_scores
from sae_persona.features.samples import SilentTexts
from sae_persona.features.token_text import token_text
from sae_persona.sae.model import SAE
from sae_persona.types import HookPoint

SILENT_TEXTS = 512
"""Contexts, each of another latent, that texts without a latent are taken from."""


@dataclass(frozen=True, kw_only=True)
class DescribeConfig:
    """How latents are described."""

    n_tokens: int = 10
    """Tokens listed at either end of the logit lens."""
    z_scored: bool = False
    """List tokens by z-scores over the latents, not by logits."""
    lens_top: int = 20
    """First tokens of the lens (always by logits) that input and output scores ask about."""
    outputs: bool = True
    """Score what raising each latent does, which takes a forward pass for each batch."""
    prompt: str = "From my experience,"
    """Neutral text at whose last token the output score raises a latent."""
    boost: float = 10.0
    """How far it is raised, in units of the strongest latent there."""
    batch: int = 64
    """Latents raised in one forward pass, one a row."""

    def __post_init__(self) -> None:
        if min(self.n_tokens, self.lens_top, self.batch) < 1:
            got = f"{self.n_tokens}, {self.lens_top}, {self.batch}"
            raise ConfigError(f"n_tokens, lens_top and batch are at least 1, got {got}")
        if not 0 < self.boost < float("inf"):
            raise ConfigError(f"boost is above 0, got {self.boost}")


def describe(
    lm: LM,
    hook: HookPoint,
    sae: SAE,
    contexts: TopContexts,
    latents: Sequence[int],
    config: DescribeConfig | None = None,
    *,
    on_done: Callable[[int], object] | None = None,
) -> list[Description]:
    """Tokens and scores of the latents, in order.

    contexts   of all latents, as `measure` found them
    on_done    told how many latents are further by one batch

    DataError for a latent that does not exist or a prompt at which nothing fires, ModelError if the model has no logit
    lens (see `find_unembedding`), the SAE is another one's or a transcoder.
    """
    config = config or DescribeConfig()
    check_latents(latents, sae.n_latents)
    lens, chosen = LogitLens(lm, sae), torch.tensor(list(latents), dtype=torch.int64)
    by_logits = lens.tokens(chosen, max(config.n_tokens, config.lens_top))
    listed = lens.tokens(chosen, config.n_tokens, z_scored=True) if config.z_scored else by_logits
    top, outputs = by_logits.promoted[:, : config.lens_top], None
    if config.outputs:
        outputs = output_scores(
            lm, sae, hook, chosen, top, prompt=config.prompt, boost=config.boost, batch=config.batch, on_done=on_done
        ).score.tolist()

    def tokens(ids: Tensor, values: Tensor) -> tuple[tuple[str, float], ...]:
        pairs = zip(ids[: config.n_tokens].tolist(), values[: config.n_tokens].tolist(), strict=True)
        return tuple((token_text(lm.tokenizer, token), round(value, 4)) for token, value in pairs)

    found = []
    for row, latent in enumerate(latents):
        own = contexts.of(latent)
        found.append(
            Description(
                latent=int(latent),
                promoted=tokens(listed.promoted[row], listed.promoted_logits[row]),
                suppressed=tokens(listed.suppressed[row], listed.suppressed_logits[row]),
                concentration=token_concentration(own),
                input_score=input_score(own, set(top[row].tolist())),
                output_score=outputs[row] if outputs else None,
            )
        )
    return found


def check_latents(latents: Sequence[int], n_latents: int) -> None:
    """DataError if there is none, or one does not exist."""
    if not latents:
        raise DataError("no latent to describe")
    for latent in latents:
        if not 0 <= latent < n_latents:
            raise DataError(f"latent {latent} does not exist: there are latents 0 to {n_latents - 1}")


def silent_texts(lm: LM, hook: HookPoint, sae: SAE, found: Measurement, *, seed: int) -> SilentTexts:
    """The strongest contexts of random latents, at most one from a document, read again: see `SilentTexts`."""
    chosen: dict[int, Context] = {}
    fired = np.flatnonzero(found.stats.fired.cpu().numpy() > 0)
    for latent in np.random.default_rng(seed).permutation(fired):
        for context in found.contexts.of(int(latent))[:1]:
            chosen.setdefault(context.document, context)
        if len(chosen) == SILENT_TEXTS:
            break
    return SilentTexts(lm, sae, hook, list(chosen.values()))
