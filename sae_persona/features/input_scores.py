"""Scores of what a latent reads, from its contexts alone."""

from collections import Counter
from collections.abc import Collection, Sequence

from sae_persona.features.contexts import Context


def token_concentration(contexts: Sequence[Context]) -> float | None:
    """Share of the activation in all contexts that falls on the one token that gets most: in (0, 1].

    1: it fires on a single token of the vocabulary, whatever stands around. None without a context.
    """
    mass: Counter[int] = Counter()
    for context in contexts:
        for token, act in zip(context.tokens, context.acts, strict=True):
            mass[token] += act  # pyright: ignore[reportArgumentType]
    total = sum(mass.values())
    return max(mass.values()) / total if total > 0 else None


def input_score(contexts: Sequence[Context], promoted: Collection[int]) -> float | None:
    """Share of contexts whose strongest token is among ``promoted``, the top of the logit lens. None without a context.

    High for latents that read what they write. Arad et al., 2025 (2505.20063), who take the 20 first of the lens.
    """
    if not contexts:
        return None
    peaks = [context.tokens[context.acts.index(max(context.acts))] for context in contexts]
    return sum(peak in promoted for peak in peaks) / len(peaks)
