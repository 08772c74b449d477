"""Which latents fire on a passage more than they usually do: each against its own distribution over the corpus."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse, special

from sae_persona.errors import DataError
from sae_persona.features.stats import EDGES, LatentStats


@dataclass(frozen=True)
class Surprise:
    """Latents that fire on a passage, most surprising first.

    latents    [m] int64
    surprise   [m]   -log10 of the chance, see `surprise`
    times      [m]   mean activation on the passage over that on the corpus; inf where it never fired there
    """

    latents: np.ndarray
    surprise: np.ndarray
    times: np.ndarray


def surprise(acts: sparse.csr_matrix, stats: LatentStats) -> Surprise:
    """Rank the latents that fire on a passage of n tokens by how unlikely that is on n tokens of the corpus.

    acts   [n, n_latents]   latents on the passage's tokens

    Let a_1 >= a_2 >= ... be a latent's activations on the passage and p_j = (tokens of the corpus on which it was at
    least a_j, by its histogram, + 1) / (tokens + 1). Then

        surprise = max over j of -log10 P(Binomial(n, p_j) >= j)

    which is large for a latent that fires on many more of the tokens than usual and for one that fires harder (Berk
    and Jones, Z. Wahrscheinlichkeitstheorie 47, 1979). It takes tokens as independent, which they are not: an order,
    not a p-value. DataError if passage and statistics are not of one SAE.
    """
    n, n_latents = acts.shape  # pyright: ignore
    if n_latents != stats.n_latents:
        raise DataError(f"the passage has {n_latents} latents, the statistics {stats.n_latents}: measure the run again")
    entries = acts.tocoo()
    fires = entries.data > 0
    column, value = entries.col[fires], entries.data[fires]
    order = np.lexsort((np.negative(value), column))
    column, value = column[order], value[order]
    latents, first = np.unique(column, return_index=True)
    place = np.repeat(np.arange(len(latents)), np.diff(np.append(first, len(column))))
    count = np.arange(len(column)) - first[place] + 1
    # the chance of at least j among n is that of a Beta(j, n - j + 1) below p
    tails = special.betainc(count, n - count + 1, _exceeding(stats, latents, place, value))
    tail = np.minimum.reduceat(tails, first) if len(first) else tails
    mean = np.bincount(place, value, minlength=len(latents)) / n
    with np.errstate(divide="ignore"):
        found = -np.log10(np.maximum(tail, np.finfo(float).tiny))
        times = mean / stats.mean.numpy()[latents]
    best = np.lexsort((latents, np.negative(times), np.negative(found)))
    return Surprise(latents[best].astype(np.int64), found[best], times[best])


def _exceeding(stats: LatentStats, latents: np.ndarray, place: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Share of the corpus's tokens on which latent ``latents[place]`` was at least in the bin of ``value``."""
    histogram = stats.histogram[latents].cpu().numpy()
    at_least = histogram[:, ::-1].cumsum(axis=1)[:, ::-1]
    bins = np.clip(
        np.searchsorted(EDGES.numpy(), value.astype(np.float32), side="right") - 1, 0, histogram.shape[1] - 1
    )
    return (at_least[place, bins] + 1) / (stats.n_tokens + 1)
