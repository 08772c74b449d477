"""How the activations of two dictionaries on the same tokens correlate, for candidate pairs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_persona.errors import DataError
from sae_persona.features.pooled import to_csr
from sae_persona.sae.model import DENSE_ENTRIES, SAE
from sae_persona.types import SparseLatents


@dataclass(frozen=True)
class Correlations:
    """Pearson's r of each latent of the first dictionary with its candidates in the second.

    candidates [n_a, c] int64   a latent that stands there twice is the same one
    r          [n_a, c] fp32    zeros counted; NaN where one of the two does not vary
    n_tokens   tokens that were read
    """

    candidates: Tensor
    r: Tensor
    n_tokens: int


class _Moments:
    """Sum and sum of squares of every latent: [n_latents] fp64."""

    def __init__(self, sae: SAE) -> None:
        self.total, self.squares = (torch.zeros(sae.n_latents, dtype=torch.float64, device=sae.w_dec.device),) * 2
        self.squares = self.squares.clone()

    def update(self, latents: SparseLatents) -> None:
        acts, idx = latents.acts.flatten().double(), latents.idx.flatten()
        self.total.index_add_(0, idx, acts)
        self.squares.index_add_(0, idx, acts.square())

    def spread(self, n: int) -> Tensor:
        """n times the standard deviation; 0 where rounding leaves less than nothing."""
        return (n * self.squares - self.total.square()).clamp(min=0).sqrt()


def correlate(
    a: SAE, b: SAE, acts: Iterable[Tensor], near: Tensor, *, cofiring: int, first_tokens: int
) -> Correlations:
    """Read batches [n, d_in] once; candidates are ``near`` [n_a, k] and ``cofiring`` more, which fire together.

    DataError if there is no token, ModelError for a batch of another width.
    """
    batches = ((a.encode(x), b.encode(x)) for x in (batch.to(a.w_enc) for batch in acts))
    first: list[tuple[SparseLatents, SparseLatents]] = []
    for pair in batches:
        first.append(pair)
        if sum(one.n for one, _ in first) >= first_tokens:
            break
    if not sum(one.n for one, _ in first):
        raise DataError("no token to correlate over: give some texts")
    candidates = near
    if cofiring:
        together = _cofiring(first, a.n_latents, b.n_latents, cofiring)
        # where there are fewer, the nearest stands there again
        together = torch.where(together >= 0, together, near[:, :1].cpu()).to(near.device)
        candidates = torch.cat([near, together], 1)
    products = torch.zeros(candidates.shape, dtype=torch.float64, device=near.device)
    of_a, of_b, n = _Moments(a), _Moments(b), 0
    for ours, theirs in _chained(first, batches):
        of_a.update(ours)
        of_b.update(theirs)
        _add_products(products, candidates, ours, theirs, b.n_latents)
        n += ours.n
    spread = of_a.spread(n)[:, None] * of_b.spread(n)[candidates]
    centred = n * products - of_a.total[:, None] * of_b.total[candidates]
    r = torch.where(spread > 0, centred / spread, torch.nan).clamp(-1, 1)
    return Correlations(candidates, r.float(), n)


def _chained(first: list, rest: Iterator) -> Iterator[tuple[SparseLatents, SparseLatents]]:
    while first:
        yield first.pop(0)  # and let go of it
    yield from rest


def _add_products(
    products: Tensor, candidates: Tensor, ours: SparseLatents, theirs: SparseLatents, n_latents: int
) -> None:
    """Add sum over tokens of a_i b_j to ``products`` [n_a, c], for j = candidates [n_a, c].

    For every latent of a that fires its candidates' activations are looked up in b's, dense for a few tokens at a time.
    """
    rows = max(1, DENSE_ENTRIES // n_latents)
    of_a, of_b = (_entries(latents) for latents in (ours, theirs))
    dense = products.new_zeros((rows, n_latents), dtype=torch.float32)
    for start in range(0, ours.n, rows):
        token_a, idx_a, acts_a = _between(of_a, start, start + rows)
        token_b, idx_b, acts_b = _between(of_b, start, start + rows)
        dense[token_b - start, idx_b] = acts_b
        found = dense[(token_a - start)[:, None], candidates[idx_a]]
        products.index_add_(0, idx_a, acts_a.double()[:, None] * found)
        dense[token_b - start, idx_b] = 0.0


Entries = tuple[Tensor, Tensor, Tensor]


def _entries(latents: SparseLatents) -> Entries:
    """Token, latent and activation of every one that fires, in the tokens' order."""
    acts, idx = latents.acts.flatten(), latents.idx.flatten()
    fires = acts > 0
    return latents.token[fires], idx[fires], acts[fires]


def _between(entries: Entries, start: int, stop: int) -> Entries:
    ends = torch.tensor([start, stop], device=entries[0].device)
    first, last = torch.searchsorted(entries[0], ends).tolist()
    token, idx, acts = (part[first:last] for part in entries)
    return token, idx, acts


def _cofiring(first: list[tuple[SparseLatents, SparseLatents]], n_a: int, n_b: int, k: int) -> Tensor:
    """The k latents of b that correlate most with each of a on the first tokens: [n_a, k] int64, -1: no more."""
    ours, theirs = (
        sparse.csc_matrix(sparse.vstack([to_csr(pair[side], n) for pair in first])) for side, n in ((0, n_a), (1, n_b))
    )
    n = ours.shape[0]  # pyright: ignore
    products = sparse.csr_matrix(ours.T @ theirs)
    means = [np.asarray(x.mean(axis=0)).ravel() for x in (ours, theirs)]
    spreads = [
        np.sqrt(np.maximum(np.asarray(x.multiply(x).mean(axis=0)).ravel() - mean**2, 1e-30))
        for x, mean in zip((ours, theirs), means, strict=True)
    ]
    latent = np.repeat(np.arange(n_a), np.diff(products.indptr))
    r = products.data / n - means[0][latent] * means[1][products.indices]
    r = r / (spreads[0][latent] * spreads[1][products.indices])
    order = np.lexsort((-r, latent))
    rank = np.arange(len(order)) - products.indptr[latent]
    kept = order[(rank < k) & (r[order] > 0)]
    found = np.full((n_a, k), -1, np.int64)
    found[latent[kept], rank[(rank < k) & (r[order] > 0)]] = products.indices[kept]
    return torch.from_numpy(found)
