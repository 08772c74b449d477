"""Beside the latents: dense directions of the residual stream that tell a tuned model from its base.

Each direction is fitted on half of the prompts and tells the two models apart on the other half: the difference of
means, a principal component of the difference, a linear probe, and the latent that moved most on the first half.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_persona.attribution.association import Interval
from sae_persona.attribution.baselines import COMPONENTS, difference_of_means, logistic_probe
from sae_persona.errors import DataError
from sae_persona.sae.model import SAE
from sae_persona.studies.separation import paired_auroc, wins

PROBE_C = 0.1
"""The probe's inverse penalty, on standardised inputs."""


@dataclass(frozen=True)
class Separation:
    """How well one measure tells the tuned model from its base."""

    name: str
    auroc: Interval
    """On prompts that it was not fitted on."""
    note: str = ""


def halves(keys: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the prompts to fit on and to test on: half each, by their keys, the same for every model."""
    order = np.argsort(np.array(keys), kind="stable")
    return np.sort(order[::2]), np.sort(order[1::2])


def difference_component(d: np.ndarray, base: np.ndarray, tuned: np.ndarray) -> tuple[np.ndarray, str]:
    """Of the first principal components of d = tuned - base [n, d_in], the one that tells them best, pointing to tuned.

    Centred, so that it is not the mean that is found again. With a note that says which it is and what it explains.
    """
    centred = d - d.mean(0)
    _, sizes, components = np.linalg.svd(centred, full_matrices=False)
    components = components[: min(COMPONENTS, len(d) - 1)]
    away = np.array([wins(tuned @ c, base @ c).mean() - 0.5 for c in components])
    best = int(np.abs(away).argmax())
    share = float(sizes[best] ** 2 / max((sizes**2).sum(), 1e-30))
    return components[best] * (1 if away[best] >= 0 else -1), f"component {best + 1}, {share:.0%} of the variance"


def separations(
    sae: SAE, base: Tensor, tuned: Tensor, keys: tuple[str, ...], *, resamples: int, seed: int
) -> tuple[Separation, ...]:
    """Fit and test on x of both models, [n, d_in] each on the same prompts. DataError for fewer than four prompts."""
    if len(base) < 4:
        raise DataError(f"{len(base)} prompts are too few to fit on one half and test on the other: at least 4")
    fit, test = halves(keys)
    b, t = base.double().numpy(), tuned.double().numpy()
    x, y = np.concatenate([t[fit], b[fit]]), np.arange(2 * len(fit)) < len(fit)
    mean = difference_of_means(x, y)
    component, note = difference_component(t[fit] - b[fit], b[fit], t[fit])
    w_enc = sae.w_enc.double().cpu().numpy()
    spread = (b[fit] @ w_enc.T).std(0)
    moved = (w_enc @ mean) / np.where(spread > 0, spread, np.inf)
    latent = int(np.abs(moved).argmax())
    cosine = float(torch.cosine_similarity(torch.from_numpy(mean), sae.w_dec[latent].double().cpu(), dim=0))
    size = np.linalg.norm(mean) / np.linalg.norm(b[fit], axis=1).mean()
    directions = {
        f"latent {latent}": (w_enc[latent] * np.sign(moved[latent]), "moved most, in standard deviations"),
        "difference of means": (mean, f"{size:.2f} of the stream's norm, cosine {cosine:+.2f} with latent {latent}"),
        "PCA of the difference": (component, note),
        "linear probe": (logistic_probe(x, y, PROBE_C), f"C {PROBE_C:g}"),
    }
    return tuple(
        Separation(name, paired_auroc(b[test] @ v, t[test] @ v, resamples=resamples, seed=seed), said)
        for name, (v, said) in directions.items()
    )
