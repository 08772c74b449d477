"""Sparsity rules: which pre-activations become latent activations.

Each rule has ``select(pre_acts [n, n_latents]) -> SparseLatents`` and says in ``local`` whether a latent's activation
follows from its own pre-activation alone. Local rules also have ``gate(pre_acts [..., m], idx [m])``: the activations
of chosen latents, zeros included. BatchTopK and JumpReLU are for training only; both end as a Threshold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from sae_kernels import ops
from torch import Tensor

from sae_persona.types import SparseLatents


@dataclass(frozen=True)
class TopK:
    """Keep the k largest pre-activations of each token, those below zero as 0. Of equal ones the lowest index.

    Gao et al., 2024 (2406.04093).
    """

    k: int
    local: ClassVar[bool] = False

    def select(self, pre_acts: Tensor) -> SparseLatents:
        k, n_latents = self.k, pre_acts.shape[1]
        values, idx = ops.topk(pre_acts, min(k + 1, n_latents))
        if k < n_latents:
            tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > 0)
            values, idx = values[:, :k], idx[:, :k].contiguous()
            if tied.any():
                idx[tied] = pre_acts[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
        return SparseLatents(values.relu(), idx)

    def among(self, pre_acts: Tensor, idx: Tensor) -> Tensor:
        """Activations of chosen latents: [n, n_latents] and [m] int64 -> [n, m]. No sort, and no host waits.

        A latent is kept if fewer than k are larger, or as large and before it.
        """
        own = pre_acts[:, idx]
        before = torch.arange(pre_acts.shape[1], device=idx.device)
        columns = []
        for value, i in zip(own.split(1, dim=1), idx, strict=True):
            ahead = (pre_acts > value) | ((pre_acts == value) & (before < i))
            columns.append(ahead.sum(dim=1, keepdim=True) < self.k)
        return own.relu() * torch.cat(columns, dim=1) if columns else own


@dataclass(frozen=True)
class BatchTopK:
    """Keep the n * k largest positive pre-activations of a batch of n tokens: k a token on average.

    For training only: what a token keeps depends on the others in its batch. `calibrate` makes a Threshold of it.
    Bussmann et al., 2024 (2412.06410).
    """

    k: int

    def select(self, pre_acts: Tensor) -> SparseLatents:
        n, n_latents = pre_acts.shape
        values, flat = ops.topk(pre_acts.reshape(1, -1), n * self.k)
        flat, order = flat[values > 0].sort()
        offsets = torch.searchsorted(flat, torch.arange(n + 1, device=flat.device) * n_latents)
        return SparseLatents(values[values > 0][order], flat % n_latents, offsets)


@dataclass(frozen=True)
class Jumped:
    """Entries that a rule chose for a training step.

    near   None or [nnz] bool    JumpReLU: close to the threshold. Those that are near and do not fire have act 0
    """

    latents: SparseLatents
    near: Tensor | None = None


@dataclass(frozen=True)
class JumpReLU:
    """Keep what is strictly above the latent's threshold [n_latents], which is trained and never below 0.

    For training only; the step holds the thresholds. With L0 the mean count of firing latents a token, and entries
    near where |pre_act - threshold| < bandwidth / 2:

        loss += coef * (L0 / k - 1)^2
        d_threshold = sum over the near entries of -(threshold * d_act + d_count) / bandwidth
        d_count = 2 coef (L0 / k - 1) / (k n)

    Straight-through estimates with a rectangle window: Rajamanoharan et al., 2024 (2407.14435). The penalty on a target
    L0 is dictionary_learning's. Thresholds are trained, not their logarithms, which hardly moved under Adam
    (SAELens#494).

    k          mean latents a token that are aimed at
    bandwidth  in units of pre-activations
    coef       in units of the squared error a token
    """

    k: int
    bandwidth: float
    coef: float

    def select(self, pre_acts: Tensor, threshold: Tensor) -> Jumped:
        """What fires or is near."""
        latents = _where(pre_acts, pre_acts > threshold - self.bandwidth / 2)
        above = latents.acts - threshold[latents.idx]
        acts = latents.acts * (above > 0)
        return Jumped(SparseLatents(acts, latents.idx, latents.offsets), above.abs() < self.bandwidth / 2)

    def loss(self, l0: Tensor) -> Tensor:
        """The weighted sparsity loss of a batch in which ``l0`` latents a token fire on average."""
        return self.coef * (l0 / self.k - 1).square()

    def slopes(self, chosen: Jumped, d_acts: Tensor, threshold: Tensor, l0: Tensor) -> Tensor:
        """Each entry's term of d_threshold: [nnz]. ``d_acts`` [nnz] are those of all entries, firing or not."""
        assert chosen.near is not None, "select says what is near"
        d_count = 2 * self.coef * (l0 / self.k - 1) / (self.k * chosen.latents.n)
        return -(threshold[chosen.latents.idx] * d_acts + d_count) * chosen.near / self.bandwidth


@dataclass(frozen=True, eq=False)
class Threshold:
    """Keep what is positive and strictly above the latent's threshold [n_latents]: JumpReLU (2407.14435)."""

    threshold: Tensor
    local: ClassVar[bool] = True

    def select(self, pre_acts: Tensor) -> SparseLatents:
        return _where(pre_acts, pre_acts > self.threshold.clamp(min=0))

    def gate(self, pre_acts: Tensor, idx: Tensor) -> Tensor:
        return pre_acts * (pre_acts > self.threshold[idx].clamp(min=0))


@dataclass(frozen=True)
class ReLU:
    """Keep what is positive."""

    local: ClassVar[bool] = True

    def select(self, pre_acts: Tensor) -> SparseLatents:
        return _where(pre_acts, pre_acts > 0)

    def gate(self, pre_acts: Tensor, idx: Tensor) -> Tensor:
        return pre_acts.relu()


Rule = TopK | Threshold | ReLU
TrainingRule = TopK | BatchTopK | JumpReLU


def k_at(step: int, total: int | None, k: int, start: int, share: float) -> int:
    """The k of a step, counted from 0, of ``total``: on a line from ``start`` to ``k``, over the first ``share``.

    Rounded to a whole number. ``k`` throughout while ``total`` is not known, or with a share of 0. The schedule is
    dictionary_learning's (``k_anneal_steps``), which starts at d_in and rounds down.
    """
    if total is None or share == 0:
        return k
    return round(start + (k - start) * min(1.0, step / (share * total)))


def _where(pre_acts: Tensor, kept: Tensor) -> SparseLatents:
    """The kept entries of [n, n_latents], as CSR."""
    flat = kept.flatten().nonzero().flatten()
    offsets = torch.nn.functional.pad(kept.sum(dim=1).cumsum(0), (1, 0))
    return SparseLatents(pre_acts.flatten()[flat], flat % pre_acts.shape[1], offsets)


def cat(parts: Sequence[SparseLatents]) -> SparseLatents:
    """The tokens of several batches of one rule in a row."""
    acts, idx = torch.cat([p.acts for p in parts]), torch.cat([p.idx for p in parts])
    if parts[0].offsets is None:
        return SparseLatents(acts, idx)
    counts = torch.cat([p.offsets.diff() for p in parts if p.offsets is not None])
    return SparseLatents(acts, idx, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


def calibrate(pre_acts: Callable[[Tensor], Tensor], batches: Sequence[Tensor], k: int) -> float:
    """The threshold above which exactly k pre-activations a token lie on average over the batches [n, d_in].

    Ties aside, and never below 0. Each batch is encoded twice, so that only one is ever dense.
    """
    # the n * k-th value of a batch bounds the threshold of all from below, for the batch where it is least
    floor = min(ops.topk(pre_acts(x).reshape(1, -1), len(x) * k)[0].min() for x in batches)
    above = torch.cat([pre[pre >= floor] for pre in map(pre_acts, batches)])
    last_kept = above.topk(k * sum(len(x) for x in batches)).values.min()
    return max(0.0, torch.nextafter(last_kept, last_kept.new_tensor(-torch.inf)).item())
