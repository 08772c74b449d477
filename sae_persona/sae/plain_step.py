"""One training step in plain torch, on any device: the CPU's, and the reference of the kernels. Formulas: `step.py`."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from sae_kernels import ops
from torch import Tensor

from sae_persona.errors import ConfigError
from sae_persona.sae.loss import auxk_loss
from sae_persona.sae.nested import Groups, by_prefix, wider
from sae_persona.sae.shard import ALONE, Shard
from sae_persona.sae.sparsity import BatchTopK, Jumped, JumpReLU, TopK, TrainingRule
from sae_persona.sae.step import Seen, Weights, threshold_lr
from sae_persona.types import SparseLatents


class PlainStep:
    """The trained weights, their optimiser and the count of tokens since each latent fired.

    A batch whose error is not finite leaves the weights as they were and is counted in ``flagged``.

    weights     changed in place; the rows of w_dec have unit norm before and after each call
    threshold   [n_latents], JumpReLU's, changed in place and never below 0; None for the other rules
    prefixes    rising sizes of nested dictionaries, the last n_latents; empty: only the whole
    multi_topk  train the 4 k largest latents of a token to rebuild it, too. ConfigError but with TopK and no prefixes
    k_aux       dead latents a token in the AuxK loss, which weighs less while fewer are dead. None: d_in // 2
    dead_after  tokens without firing after which a latent is dead
    clip        norm that all gradients together are cut to; None: not cut
    mean        [d_in], taken from each batch; None: nothing is
    scale       what the rest of it is multiplied by
    shard       the rank whose block of the latents the weights are; n_latents and prefixes are those of all ranks,
                everything else is of the block
    """

    def __init__(
        self,
        weights: Weights,
        rule: TrainingRule,
        *,
        threshold: Tensor | None = None,
        prefixes: tuple[int, ...] = (),
        multi_topk: bool = False,
        k_aux: int | None,
        auxk_coef: float,
        dead_after: int,
        clip: float | None = None,
        mean: Tensor | None = None,
        scale: float = 1.0,
        shard: Shard = ALONE,
    ) -> None:
        n_rows, d_in = weights.w_enc.shape
        first, n_latents = shard.placed(n_rows)
        assert isinstance(rule, JumpReLU) == (threshold is not None), "thresholds are trained by JumpReLU alone"
        assert not prefixes or prefixes[-1] == n_latents, f"the last of {prefixes} must be all {n_latents} latents"
        self.weights, self.rule, self.threshold = weights, rule, threshold
        if multi_topk and (prefixes or not isinstance(rule, TopK)):
            got = "prefixes" if prefixes else type(rule).__name__
            raise ConfigError(f"multi_topk is for rule topk without prefixes, got {got}: leave one of them out")
        if multi_topk and shard.world > 1:
            raise ConfigError("multi_topk is for one process, got several ranks: leave it out")
        self.multi_topk = multi_topk
        own = [max(0, size - first) for size in prefixes]
        self.prefixes = torch.tensor(own, device=weights.w_enc.device) if len(prefixes) > 1 else None
        self.shard, self.n_all = shard, n_latents
        self.k_aux = d_in // 2 if k_aux is None else k_aux
        self.auxk_coef, self.dead_after, self.clip = auxk_coef, dead_after, clip
        self.mean, self.scale = mean, scale
        self.silent = torch.zeros(n_rows, dtype=torch.int64, device=weights.w_enc.device)
        self.trained = [*weights] if threshold is None else [*weights, threshold]
        self.optimiser = torch.optim.Adam(weights, fused=True)
        if threshold is not None:
            self.optimiser.add_param_group({"params": [threshold]})
        self.flagged = 0
        self._pre_acts = weights.w_enc.new_empty(0)

    def __call__(self, x: Tensor, lr: float) -> Seen:
        """Take one step on x [n, d_in] with learning rate ``lr``."""
        seen = self.gradients(x)
        if not (seen.d_error.square().sum() if seen.nested is None else seen.nested).isfinite():
            self.flagged += 1
            return seen
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.clip, self._norm())
        for group, rate in zip(self.optimiser.param_groups, (lr, threshold_lr(lr, x.shape[1])), strict=False):
            group["lr"] = rate
        self.optimiser.step()
        w_dec = self.weights.w_dec
        w_dec.div_(torch.linalg.vector_norm(w_dec, dim=1, keepdim=True))
        if self.threshold is not None:
            self.threshold.clamp_(min=0)
        return seen

    def set_k(self, k: int) -> None:
        """From the next call on, keep ``k`` latents a token; with JumpReLU aim at them."""
        assert 1 <= k <= self.n_all, f"k must be between 1 and {self.n_all}, got {k}"
        self.rule = replace(self.rule, k=k)

    @property
    def dead(self) -> Tensor:
        """Which latents are dead: [n_latents] bool."""
        return self.silent >= self.dead_after

    def gradients(self, x: Tensor) -> Seen:
        """Set ``.grad`` of all that is trained for x [n, d_in], and count who fired. Nothing is clipped or moved."""
        x = self._normalised(x)
        w_enc, b_enc, w_dec, b_dec = self.weights
        chosen, groups = self._select(torch.addmm(b_enc, x, w_enc.T, out=self._buffer(x)))
        latents = chosen.latents
        acts = latents.acts.requires_grad_()
        parts = [ops.sparse_decode(p.acts, p.idx, w_dec, p.offsets) for p in groups.split(latents)]
        rebuilt = accumulate(self._over_ranks([part.detach() for part in parts]))
        d_errors = [torch.sub(r, x).add_(b_dec).mul_(2 / len(x)) for r in rebuilt]
        pulls = groups.pulls(d_errors)
        (d_acts,) = torch.autograd.grad(parts, acts, pulls)
        acts = acts.detach()

        lists = ops.latent_lists(latents.idx, len(w_enc), latents.offsets)
        own = groups.own(acts)
        fires = self.shard.sum((own > 0).sum())
        sparsity = self._threshold_gradients(chosen, d_acts, lists, fires / len(x))
        d_pre = d_acts * (acts > 0)
        w_enc.grad = ops.weight_grad(lists, d_pre, x)
        b_enc.grad = lists.sums(d_pre)
        w_dec.grad = groups.decoder_gradient(lists, acts, pulls)
        b_dec.grad = pulls[0].sum(dim=0)
        # the part of a decoder row's gradient along the row, sum of act * d_act, costs no dense product
        w_dec.grad.addcmul_(lists.sums(acts * d_pre)[:, None], w_dec, value=-1)

        auxk = self._auxk_gradients(x, d_errors[groups.main])
        self.silent += len(x)
        self.silent[lists.sums(own) > 0] = 0
        return Seen(x, d_errors[groups.main], fires, auxk, sparsity, groups.loss(d_errors))

    @property
    def numbers(self) -> dict[str, Any]:
        """What lasts from one step to the next on the host: JSON values."""
        return {"flagged": self.flagged}

    def go_on(self, numbers: Mapping[str, Any], *, same_block: bool) -> None:
        """Go on from such numbers; ``same_block`` if they were this rank's."""
        self.flagged = numbers["flagged"]

    def _normalised(self, x: Tensor) -> Tensor:
        centred = x if self.mean is None else x - self.mean
        return centred if self.scale == 1 else centred * self.scale

    def _select(self, pre_acts: Tensor) -> tuple[Jumped, Groups]:
        """What fires or is near, and which reconstructions it is part of."""
        if self.multi_topk:
            assert isinstance(self.rule, TopK), "multi-TopK has TopK"
            latents, groups = wider(self.rule, pre_acts)
            return Jumped(latents), groups
        if isinstance(self.rule, JumpReLU):
            assert self.threshold is not None, "JumpReLU has thresholds"
            chosen = self.rule.select(pre_acts, self.threshold)
        else:
            # a rank may have fewer latents than k
            latents = replace(self.rule, k=min(self.rule.k, pre_acts.shape[1])).select(pre_acts)
            chosen = Jumped(latents if self.shard.world == 1 else self._winners(latents))
        return chosen, Groups() if self.prefixes is None else by_prefix(chosen.latents.idx, self.prefixes)

    def _winners(self, latents: SparseLatents) -> SparseLatents:
        """What of the rank's choice is among the k largest of all ranks' choices, and above 0: CSR."""
        k, most = self.rule.k, -(-self.n_all // self.shard.world)
        if isinstance(self.rule, BatchTopK):
            assert latents.offsets is not None, "BatchTopK keeps a varying number a token"
            values, idx, offsets = latents.acts, latents.idx, latents.offsets
            chosen = self.shard.among_largest(values[None], latents.n * k, width=latents.n * min(k, most))[0]
        else:
            idx, order = latents.idx.sort(dim=1)  # so that of equal ones the lowest index comes first
            values = latents.acts.gather(1, order)
            chosen = self.shard.among_largest(values, k, width=min(k, most)).flatten()
            offsets = torch.arange(latents.n + 1, device=idx.device) * idx.shape[1]
        values, idx = values.flatten(), idx.flatten()
        chosen &= values > 0
        return SparseLatents(values[chosen], idx[chosen], _before(chosen)[offsets])

    def _over_ranks(self, parts: list[Tensor]) -> list[Tensor]:
        """The sums over ranks of parts [n, d_in], in one exchange."""
        return parts if self.shard.world == 1 else list(self.shard.sum(torch.stack(parts)))

    def _norm(self) -> Tensor:
        """Norm of all gradients, on all ranks."""
        norm = torch.nn.utils.get_total_norm
        if self.shard.world == 1:
            return norm([w.grad for w in self.trained if w.grad is not None])
        b_dec = self.weights.b_dec
        assert b_dec.grad is not None, "gradients are set before they are clipped"
        rows = norm([w.grad for w in self.trained if w is not b_dec and w.grad is not None])
        return (self.shard.sum(rows.square()) + b_dec.grad.square().sum()).sqrt()

    def _threshold_gradients(self, chosen: Jumped, d_acts: Tensor, lists: ops.LatentLists, l0: Tensor) -> Tensor | None:
        """Set the gradient of JumpReLU's thresholds; the weighted sparsity loss. None for the other rules."""
        if not isinstance(self.rule, JumpReLU):
            return None
        assert self.threshold is not None, "JumpReLU has thresholds"
        self.threshold.grad = lists.sums(self.rule.slopes(chosen, d_acts, self.threshold, l0))
        return self.rule.loss(l0)

    def _auxk_gradients(self, x: Tensor, d_error: Tensor) -> Tensor:
        """Add the gradients of the weighted AuxK loss to those of the dead rows; that loss."""
        dead = self.dead.nonzero().flatten()
        if self.auxk_coef == 0 or self.k_aux == 0 or (n_dead := self.shard.total(len(dead))) == 0:
            return x.new_zeros(())
        w_enc, b_enc, w_dec = (w[dead].requires_grad_() for w in self.weights[:3])
        pre_acts = torch.nn.functional.linear(x, w_enc, b_enc)
        share, width = self.auxk_coef * min(1, n_dead / self.k_aux), self.shard.most(len(dead))
        error = d_error * (-len(x) / 2)
        loss = share * auxk_loss(error, pre_acts, w_dec, min(self.k_aux, n_dead), shard=self.shard, width=width)
        d_enc, d_b, d_dec = torch.autograd.grad(loss, (w_enc, b_enc, w_dec))
        d_dec -= (d_dec * w_dec).sum(dim=1, keepdim=True) * w_dec.detach()
        for weight, grad in zip(self.weights[:3], (d_enc, d_b, d_dec), strict=True):
            assert weight.grad is not None, "the main loss sets the gradients first"
            weight.grad.index_add_(0, dead, grad)
        return loss.detach()

    def _buffer(self, x: Tensor) -> Tensor:
        """Room for the pre-activations, kept between steps: fresh pages would cost more than the product."""
        if len(self._pre_acts) < len(x):
            self._pre_acts = x.new_empty(len(x), len(self.weights.w_enc))
        return self._pre_acts[: len(x)]


def _before(chosen: Tensor) -> Tensor:
    """How many of the chosen entries [m] stand before each entry, and at the end how many there are: [m + 1]."""
    return torch.nn.functional.pad(chosen.cumsum(0), (1, 0))
