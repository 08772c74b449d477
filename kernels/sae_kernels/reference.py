"""Oracles in plain torch: one per op, same name, same arguments, too simple to be wrong. Never imports triton."""

from itertools import pairwise

import torch
from torch import Tensor

from sae_kernels.latent_lists import LatentLists


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, idx = x.sort(dim=1, descending=True, stable=True)
    return values[:, :k], idx[:, :k]


def sparse_decode(acts: Tensor, idx: Tensor, w_dec: Tensor, offsets: Tensor | None = None) -> Tensor:
    if offsets is None:
        return (acts[:, :, None] * w_dec[idx]).sum(dim=1)
    return torch.stack([(acts[a:b, None] * w_dec[idx[a:b]]).sum(dim=0) for a, b in pairwise(offsets.tolist())])


def latent_lists(idx: Tensor, n_latents: int, offsets: Tensor | None = None) -> LatentLists:
    lengths = torch.full((len(idx),), idx.shape[1]) if offsets is None else offsets.diff().cpu()
    token = torch.arange(len(lengths)).repeat_interleave(lengths).to(idx.device)
    entries = [(idx.flatten() == latent).nonzero().flatten() for latent in range(n_latents)]
    counts = torch.tensor([0] + [len(e) for e in entries], device=idx.device)
    return LatentLists(torch.cat(entries), token[torch.cat(entries)], counts.cumsum(0))


def weight_grad(lists: LatentLists, values: Tensor, rows: Tensor) -> Tensor:
    terms = values.flatten()[lists.entry, None] * rows[lists.token]
    return torch.stack([terms[a:b].sum(dim=0) for a, b in pairwise(lists.offsets.tolist())])
