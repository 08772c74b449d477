"""Planted activations: sparse sums of known atoms around a mean far from zero, and SAEs trained on them."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sae_persona.sae.model import SAE
from sae_persona.sae.recipe import TrainConfig
from sae_persona.sae.train import train

N_ATOMS, D_IN, K = 64, 32, 4
CONFIG = TrainConfig(n_latents=128, k=K, steps=600, lr=4e-3, dead_after=20_000)


@dataclass(frozen=True)
class Planted:
    """Unit atoms [N_ATOMS, D_IN], and batches [512, D_IN] to train on and to hold out."""

    atoms: Tensor
    batches: list[Tensor]
    held_out: list[Tensor]


@pytest.fixture(scope="session")
def planted() -> Planted:
    generator = torch.Generator().manual_seed(10)  # not that of the first weights, which would be the atoms
    atoms = torch.nn.functional.normalize(torch.randn(N_ATOMS, D_IN, generator=generator), dim=1)
    mean = 10 * torch.randn(D_IN, generator=generator)
    batches = []
    for _ in range(60):
        chosen = torch.rand(512, N_ATOMS, generator=generator).topk(K, dim=1).indices
        sizes = torch.rand(512, K, generator=generator) + 0.5
        x = torch.einsum("nk,nkd->nd", sizes, atoms[chosen]) + mean
        batches.append(x + 0.02 * torch.randn(512, D_IN, generator=generator))
    return Planted(atoms, batches[:50], batches[50:])


@pytest.fixture(scope="session")
def planted_config() -> TrainConfig:
    """How SAEs are trained on the planted activations."""
    return CONFIG


@pytest.fixture(scope="session", params=["topk", "batch_topk", "jumprelu"])
def trained(request: pytest.FixtureRequest, planted: Planted) -> SAE:
    config = TrainConfig(**{**CONFIG.__dict__, "rule": request.param})
    return train(planted.batches, config, progress=False)
