"""Activations with a known dictionary, for benchmarks: sparse sums of unit atoms that are used by Zipf's law."""

import torch
from torch import Tensor

N_ACTIVE = 48  # atoms a token
ZIPF, OFFSET = 0.8, 20  # use ~ (rank + OFFSET)^-ZIPF: at 131,072 atoms and 32 kept of 8,192 tokens, 62% of atoms fire


def atoms(n_latents: int, d_in: int, *, seed: int, device: str) -> Tensor:
    """A unit dictionary [n_latents, d_in] fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(n_latents, d_in, generator=generator, device=device)
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def batch(dictionary: Tensor, n: int, *, seed: int, outliers: int = 0) -> Tensor:
    """Activations [n, d_in] bf16, of mean squared norm d_in but for the outliers.

    outliers   dimensions that are 50 times larger than the rest, and 1000 times on every 128th token, as at BOS
    """
    (n_latents, d_in), device = dictionary.shape, dictionary.device
    generator = torch.Generator(device).manual_seed(seed)
    rates = (torch.arange(n_latents, device=device, dtype=torch.float64) + OFFSET) ** -ZIPF
    steps = (rates / rates.sum()).cumsum(0)
    rank = torch.randperm(n_latents, generator=torch.Generator(device).manual_seed(7), device=device)
    x = torch.empty(n, d_in, device=device, dtype=torch.bfloat16)
    for part in x.split(1024):
        drawn = torch.rand(len(part), N_ACTIVE, generator=generator, device=device, dtype=torch.float64)
        idx = rank[torch.searchsorted(steps, drawn).clamp(max=n_latents - 1)]
        sizes = torch.randn(len(part), N_ACTIVE, generator=generator, device=device).mul(0.5).exp()
        rows = torch.nn.functional.embedding_bag(idx, dictionary, mode="sum", per_sample_weights=sizes)
        rows += 0.02 * torch.randn(len(part), d_in, generator=generator, device=device)
        rows *= d_in**0.5 / torch.linalg.vector_norm(rows, dim=1).square().mean().sqrt()
        if outliers:
            rows[:, :outliers] *= 50
            rows[::128, :outliers] *= 20
        part.copy_(rows)
    return x
