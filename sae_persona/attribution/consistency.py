"""Whether a latent goes with the label in every template, or is carried by a few."""

from dataclasses import dataclass

import numpy as np
import torch

from sae_persona.attribution.midranks import SortedColumns

_FEWEST = 2
"""Examples of each class in a template that is looked at."""


@dataclass(frozen=True)
class Consistency:
    """AUROC of each latent within each template: arrays [n_latents], NaN if no template has both classes.

    n            templates with at least two examples of each class
    agreement    share of them in which the latent goes in the direction asked about; AUROC 0.5 does not
    low, high    smallest and largest AUROC over them
    """

    n: int
    agreement: np.ndarray
    low: np.ndarray
    high: np.ndarray


def consistency(columns: SortedColumns, y: np.ndarray, templates: np.ndarray, direction: np.ndarray) -> Consistency:
    """Look at each template alone: y [m] bool, templates [m] of any names, direction [n_latents] of +1 and -1."""
    names, template = np.unique(templates, return_inverse=True)
    n1, n0 = np.bincount(template, y), np.bincount(template, ~y)
    used = np.minimum(n1, n0) >= _FEWEST
    if not used.any():
        unknown = np.full(columns.n_latents, np.nan)
        return Consistency(0, unknown, unknown, unknown)
    ranked = columns.within(template, len(names))
    labels = torch.from_numpy(y).to(columns.row.device)[:, None]
    centred = (ranked.products(ranked.doubled, labels)[:, 0] / 2).view(-1, len(names)).cpu().numpy()[:, used]
    zero = ranked.zero_midrank.view(-1, len(names)).cpu().numpy()[:, used]
    n1, n0 = n1[used], n0[used]
    auroc = (centred + n1 * zero - n1 * (n1 + 1) / 2) / (n1 * n0)
    agrees = (auroc - 0.5) * direction[:, None] > 0
    return Consistency(int(used.sum()), agrees.mean(1), auroc.min(1), auroc.max(1))
