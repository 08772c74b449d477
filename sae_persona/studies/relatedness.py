"""How near two traits are, by everything that could foretell that one pulls the other along: a matrix a measure.

cosine of means      of the differences of means of both traits
cosine of decoders   of the decoder directions of their best latents
read-out             e_j . d_i: by how much steering i's best latent moves the pre-activation of j's; directed
Jaccard              of the sets of their best latents
RBO                  rank-biased overlap of their rankings, (1 - p) sum_k p^(k-1) |A_k and B_k| / k, over the first
                     latents of both and divided by what equal lists reach (Webber, Moffat and Zobel 2010)
phi                  correlation of "latent i fires" and "latent j fires" over tokens
NPMI                 ln(p(ij) / (p(i) p(j))) / -ln p(ij), -1 where they never fire together
firing given i       p(j fires | i fires) - p(j fires); directed
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_persona.errors import DataError
from sae_persona.sae.model import SAE

PERSISTENCE = 0.9
"""p of RBO: the first ten ranks carry 86 % of the weight."""


def relatedness(
    sae: SAE, means: Tensor, ranked: Sequence[Sequence[int]], fires: sparse.csr_matrix
) -> dict[str, np.ndarray]:
    """Every measure of every ordered pair of n traits, [n, n] fp64; the diagonal is what it is.

    means    [n, d_in]   differences of means
    ranked   of each trait its latents, the best first; as many of each are compared as the shortest has
    fires    [tokens, n_latents]   anything but 0 where a latent fires

    DataError for a trait without latents.
    """
    if not ranked or not all(len(one) for one in ranked):
        raise DataError("a trait has no latent that rises with it: leave it out, or rank again")
    best = [one[0] for one in ranked]
    encoder, decoder = (w.detach().cpu().double()[best] for w in (sae.w_enc, sae.w_dec))
    depth = min(map(len, ranked))
    lists = [list(one[:depth]) for one in ranked]
    found = {
        "cosine of means": _cosines(means.double()),
        "cosine of decoders": _cosines(decoder),
        "read-out": (decoder @ encoder.T).numpy(),
        "Jaccard": _pairs(lists, jaccard),
        "RBO": _pairs(lists, rank_biased_overlap),
    }
    return found | cofiring(fires[:, best])


def _cosines(rows: Tensor) -> np.ndarray:
    unit = torch.nn.functional.normalize(rows, dim=1)
    return (unit @ unit.T).numpy()


def _pairs(lists: Sequence[list[int]], measure) -> np.ndarray:
    return np.array([[measure(one, other) for other in lists] for one in lists], np.float64)


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Size of the intersection over that of the union."""
    return len({*one} & {*other}) / len({*one} | {*other})


def rank_biased_overlap(one: Sequence[int], other: Sequence[int], p: float = PERSISTENCE) -> float:
    """Of two lists of one length, from 0, nothing shared, to 1, the same order."""
    weights = p ** np.arange(len(one))
    shared = [len({*one[:k]} & {*other[:k]}) / k for k in range(1, len(one) + 1)]
    return float((weights * shared).sum() / weights.sum())


def cofiring(fires: sparse.csr_matrix) -> dict[str, np.ndarray]:
    """phi, NPMI and firing given i of the columns of [tokens, n]. NaN where one of the two fires always, or never."""
    on = (fires.toarray() != 0).astype(np.float64)
    both = on.T @ on / len(on)
    p = np.diag(both)
    with np.errstate(divide="ignore", invalid="ignore"):
        alone = np.outer(p, p)
        phi = (both - alone) / np.sqrt(np.outer(p * (1 - p), p * (1 - p)))
        npmi = np.where(both > 0, np.log(both / alone) / -np.log(both), -1.0)
        given = both / p[:, None] - p[None, :]
    never = (p == 0)[:, None] | (p == 0)[None, :]
    npmi[never] = np.nan
    phi[~np.isfinite(phi)] = np.nan
    return {"phi": phi, "NPMI": npmi, "firing given i": given}
