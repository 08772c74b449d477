"""One training step in plain torch, on any device: the CPU's, and the reference of the kernels. Formulas: `step.py`."""

from dataclasses import replace
from itertools import accumulate

import torch
from sae_kernels import ops
from torch import Tensor

from sae_persona.errors import ConfigError
from sae_persona.sae.loss import auxk_loss
from sae_persona.sae.nested import Groups, by_prefix, wider
from sae_persona.sae.sparsity import Jumped, JumpReLU, TopK, TrainingRule
from sae_persona.sae.step import Seen, Weights, threshold_lr
from sae_persona.types import State


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
    ) -> None:
        n_latents, d_in = weights.w_enc.shape
        assert isinstance(rule, JumpReLU) == (threshold is not None), "thresholds are trained by JumpReLU alone"
        assert not prefixes or prefixes[-1] == n_latents, f"the last of {prefixes} must be all {n_latents} latents"
        self.weights, self.rule, self.threshold = weights, rule, threshold
        if multi_topk and (prefixes or not isinstance(rule, TopK)):
            got = "prefixes" if prefixes else type(rule).__name__
            raise ConfigError(f"multi_topk is for rule topk without prefixes, got {got}: leave one of them out")
        self.multi_topk = multi_topk
        self.prefixes = torch.tensor(prefixes, device=weights.w_enc.device) if len(prefixes) > 1 else None
        self.k_aux = d_in // 2 if k_aux is None else k_aux
        self.auxk_coef, self.dead_after, self.clip = auxk_coef, dead_after, clip
        self.mean, self.scale = mean, scale
        self.silent = torch.zeros(n_latents, dtype=torch.int64, device=weights.w_enc.device)
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
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
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
        assert 1 <= k <= len(self.weights.w_enc), f"k must be between 1 and {len(self.weights.w_enc)}, got {k}"
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
        rebuilt = accumulate(part.detach() for part in parts)
        d_errors = [torch.sub(r, x).add_(b_dec).mul_(2 / len(x)) for r in rebuilt]
        pulls = groups.pulls(d_errors)
        (d_acts,) = torch.autograd.grad(parts, acts, pulls)
        acts = acts.detach()

        lists = ops.latent_lists(latents.idx, len(w_enc), latents.offsets)
        sparsity = self._threshold_gradients(chosen, d_acts, lists, len(x))
        d_pre = d_acts * (acts > 0)
        w_enc.grad = ops.weight_grad(lists, d_pre, x)
        b_enc.grad = lists.sums(d_pre)
        w_dec.grad = groups.decoder_gradient(lists, acts, pulls)
        b_dec.grad = pulls[0].sum(dim=0)
        # the part of a decoder row's gradient along the row, sum of act * d_act, costs no dense product
        w_dec.grad.addcmul_(lists.sums(acts * d_pre)[:, None], w_dec, value=-1)

        auxk = self._auxk_gradients(x, d_errors[groups.main])
        own = groups.own(acts)
        self.silent += len(x)
        self.silent[lists.sums(own) > 0] = 0
        return Seen(x, d_errors[groups.main], own, auxk, sparsity, groups.loss(d_errors))

    def snapshot(self) -> State:
        tensors = {f"trained.{i}": w for i, w in enumerate(self.trained)}
        for i, w in enumerate(self.trained):
            tensors |= {f"adam.{i}.{name}": x for name, x in self.optimiser.state[w].items()}
        return State({**tensors, "silent": self.silent}, {"flagged": self.flagged})

    def restore(self, state: State) -> None:
        for i, w in enumerate(self.trained):
            w.copy_(state.tensors[f"trained.{i}"])
            moments = state.of(f"adam.{i}.").tensors
            # Adam wants its count on a CPU or on the weights' device, as it made it
            self.optimiser.state[w] = {name: x.to(w.device, copy=True) for name, x in moments.items()}
        self.silent.copy_(state.tensors["silent"])
        self.flagged = state.numbers["flagged"]

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
            chosen = Jumped(self.rule.select(pre_acts))
        return chosen, Groups() if self.prefixes is None else by_prefix(chosen.latents.idx, self.prefixes)

    def _threshold_gradients(self, chosen: Jumped, d_acts: Tensor, lists: ops.LatentLists, n: int) -> Tensor | None:
        """Set the gradient of JumpReLU's thresholds; the weighted sparsity loss. None for the other rules."""
        if not isinstance(self.rule, JumpReLU):
            return None
        assert self.threshold is not None, "JumpReLU has thresholds"
        l0 = (chosen.latents.acts > 0).sum() / n
        self.threshold.grad = lists.sums(self.rule.slopes(chosen, d_acts, self.threshold, l0))
        return self.rule.loss(l0)

    def _auxk_gradients(self, x: Tensor, d_error: Tensor) -> Tensor:
        """Add the gradients of the weighted AuxK loss to those of the dead rows; that loss."""
        dead = self.dead.nonzero().flatten()
        if self.auxk_coef == 0 or self.k_aux == 0 or len(dead) == 0:
            return x.new_zeros(())
        w_enc, b_enc, w_dec = (w[dead].requires_grad_() for w in self.weights[:3])
        pre_acts = torch.nn.functional.linear(x, w_enc, b_enc)
        share = self.auxk_coef * min(1, len(dead) / self.k_aux)
        loss = share * auxk_loss(d_error * (-len(x) / 2), pre_acts, w_dec, min(self.k_aux, len(dead)))
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
