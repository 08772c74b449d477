"""One SAE in training: from the first batches to an SAE that reads raw activations, step by step."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Self, Union

import torch
from torch import Tensor

from sae_persona.errors import DataError, RunError
from sae_persona.sae.calibration import calibrated, measured_l0
from sae_persona.sae.kernel_plan import KernelConfig
from sae_persona.sae.model import SAE
from sae_persona.sae.plain_step import PlainStep
from sae_persona.sae.recipe import TrainConfig, training_rule
from sae_persona.sae.shard import ALONE, Shard
from sae_persona.sae.shard_state import Kept, gathered, kept, put
from sae_persona.sae.sparsity import Rule, Threshold, TopK, calibrate
from sae_persona.sae.step import Measured, Weights
from sae_persona.types import State

if TYPE_CHECKING:  # CPU users need no Triton
    from sae_persona.sae.kernel_step import KernelStep

AnyStep = Union[PlainStep, "KernelStep"]
TAIL = 8  # batches kept to calibrate a threshold on, where none come after the last step


class NotFinite(RunError):
    """The loss, or the activations on a GPU, are no longer finite."""


class Trainer:
    """The step of one SAE, how far it has come, and the last batches.

    The first batches give a mean and a scale (mean squared norm d_in), so that training starts centred and learning
    rates mean the same on every model; both are folded away at the end.
    """

    def __init__(self, config: TrainConfig, step: "AnyStep", mean: Tensor, scale: float, total: int | None) -> None:
        self.config, self.step, self.total = config, step, total
        self.shard = step.shard
        self.mean, self.scale = mean, scale
        self.steps = self.tokens = 0
        self.lr = 0.0
        self.tail: deque[Tensor] = deque(maxlen=TAIL)
        self.seen: Measured | None = None

    @classmethod
    def start(
        cls,
        config: TrainConfig,
        head: Sequence[Tensor],
        total: int | None,
        kernels: KernelConfig | None,
        shard: Shard = ALONE,
    ) -> Self:
        """Random unit decoder rows, the encoder their transpose, biases 0: 2406.04093 A.1.

        Each rank of ``shard`` sees the same batches and takes its block of the latents.

        DataError for first batches that are not finite, or all equal.
        """
        mean, scale = _mean_and_scale(head)
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.nn.functional.normalize(torch.randn(config.n_latents, len(mean), generator=generator), dim=1)
        threshold, rms = None, None
        if config.rule == "jumprelu":
            w_enc = rows.to(mean.device)
            level = calibrate(lambda x: (x - mean) * scale @ w_enc.T, head, config.k_at(0, total))
            threshold = torch.full((config.n_latents,), level, device=mean.device)
        if mean.is_cuda and kernels is not None and kernels.precision == "fp8":
            rms = ((torch.cat(list(head)).float() - mean) * scale).square().mean(dim=0).sqrt()
        settings = {"kernels": kernels, "shard": shard, "threshold": threshold, "rms": rms}
        return cls(config, _step(config, rows, mean, scale, **settings), mean, scale, total)

    def update(self, batch: Tensor) -> None:
        """One step on a batch [n, d_in]."""
        self.lr = self.config.lr_at(self.steps, self.total)
        self.step.set_k(self.config.k_at(self.steps, self.total))
        self.seen = self.step(batch, self.lr)
        self.steps += 1
        self.tokens += len(batch)
        self.tail.append(batch)

    def measures(self) -> dict[str, float]:
        """What the last step saw, and the share of dead latents. NotFinite if training has gone wrong."""
        assert self.seen is not None, "measures are those of a step"
        values = self.seen.measures()
        advice = f"lower lr, now {self.config.peak_lr:g}, or look for NaN in the activations"
        if not math.isfinite(values["loss"]):
            raise NotFinite(f"the loss is {values['loss']} at step {self.steps}: {advice}")
        if self.step.flagged:
            raise NotFinite(f"the loss was not finite in {self.step.flagged} of {self.steps} steps: {advice}")
        values["dead"] = self.n_dead() / self.config.n_latents
        return {"step": self.steps, "tokens": self.tokens, **values, "lr": self.lr}

    def n_dead(self) -> int:
        """Dead latents of all ranks, each of which has to ask."""
        return self.shard.total(int(self.step.dead.sum()))

    @torch.no_grad()
    def last_good(self, head: Iterable[Tensor] = ()) -> SAE | None:
        """The SAE of the last step that was good; None if its weights are so large that nothing finite comes of them.

        head   stands in for the last batches where there are none
        """
        good = [batch for batch in self.tail or head if batch.isfinite().all()]
        w_enc = self.step.weights.w_enc
        usable = bool(good) and bool(((good[0] - self.mean) * self.scale @ w_enc.T).isfinite().all())
        return self._folded(good) if self.shard.total(usable) == self.shard.world else None

    @torch.no_grad()
    def finish(self, beyond: Sequence[Tensor] = ()) -> SAE | None:
        """The SAE that was trained, with the rule of inference; on the first of several ranks, None on the others.

        beyond   batches that were not trained on, for the threshold of BatchTopK; where they are too few the last
                 batches of training are added
        """
        found, needed = list(beyond), self.config.calibration_tokens
        for batch in reversed(self.tail):
            if sum(map(len, found)) >= needed:
                break
            found.append(batch)
        return self._folded(found)

    def _whole(self) -> tuple[Weights, Tensor | None] | None:
        """The weights and thresholds of all latents, where the activations are; None on all ranks but the first."""
        if self.shard.world == 1:
            return self.step.weights, self.step.threshold
        if (found := gathered(self.step)) is None:
            return None
        weights, threshold = found
        device = self.mean.device
        return Weights(*(w.to(device) for w in weights)), None if threshold is None else threshold.to(device)

    def _folded(self, tail: list[Tensor]) -> SAE | None:
        tail = [x.float() for x in tail]  # on a GPU they are as the model gave them
        config, scale, dead = self.config, self.scale, self.n_dead()
        if (whole := self._whole()) is None:
            return None
        (w_enc, b_enc, w_dec, b_dec), threshold = whole
        # in fp64: the mean may be far larger than what is left after subtracting it
        b_enc = (b_enc.double() / scale - w_enc.double() @ self.mean.double()).float()
        b_dec = b_dec / scale + self.mean
        rule: Rule = TopK(config.k)
        if threshold is not None:
            rule = Threshold(threshold / scale)  # as pre-activations: w_enc stays, b_enc is divided
        sae = SAE(w_enc, b_enc, w_dec, b_dec, rule)
        if config.rule == "batch_topk":
            sae = calibrated(sae, tail, config.k)
        l0 = measured_l0(sae, tail).mean
        training = {**asdict(config), "prefixes": list(config.prefixes)}  # as JSON would give them back
        sae.metadata |= {"training": training, "n_tokens": self.tokens, "l0": l0, "num_dead_features": dead}
        return sae

    def snapshot(self) -> State:
        """All that going on needs."""
        own = State(
            {"mean": self.mean, **{f"tail.{i}": x for i, x in enumerate(self.tail)}},
            {"scale": self.scale, "steps": self.steps, "tokens": self.tokens, "n_tail": len(self.tail)},
        )
        return own.joined(kept(self.step).state().under("step."))

    @classmethod
    def resumed(
        cls,
        config: TrainConfig,
        states: Sequence[State],
        total: int | None,
        kernels: KernelConfig | None,
        device: torch.device,
        shard: Shard = ALONE,
    ) -> Self:
        """As the trainer whose `snapshot` it was, to the bit; of several ranks, ``states`` has one each.

        With another number of ranks than there were, what each latent has learnt is the same.
        """
        state = states[min(shard.rank, len(states) - 1)]
        mean, scale = state.tensors["mean"].to(device), state.numbers["scale"]
        rows = torch.zeros(config.n_latents, len(mean))
        threshold = torch.zeros(config.n_latents, device=device) if config.rule == "jumprelu" else None
        step = _step(config, rows, mean, scale, kernels=kernels, shard=shard, threshold=threshold)
        put(step, [Kept.of(each.of("step.")) for each in states])
        trainer = cls(config, step, mean, scale, total)
        trainer.steps, trainer.tokens = state.numbers["steps"], state.numbers["tokens"]
        trainer.tail.extend(state.tensors[f"tail.{i}"].to(device) for i in range(state.numbers["n_tail"]))
        return trainer


def _mean_and_scale(head: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Mean [d_in] of the batches, and the factor that makes the mean squared distance from it d_in."""
    x = torch.cat(list(head)).double()
    if not x.isfinite().all():
        raise DataError("the first batches have NaN or infinite activations: load the model with dtype float32")
    mean = x.mean(dim=0)
    spread = (x - mean).square().sum(dim=1).mean().item()
    if spread <= 1e-12 * mean.square().sum().item():
        raise DataError("all activations are equal: there is nothing to learn")
    return mean.float(), math.sqrt(x.shape[1] / spread)


def _step(
    config: TrainConfig,
    rows: Tensor,
    mean: Tensor,
    scale: float,
    *,
    kernels: KernelConfig | None,
    shard: Shard,
    threshold: Tensor | None = None,
    rms: Tensor | None = None,
) -> "AnyStep":
    """The step from rows [n_latents, d_in] for both matrices, on the device of ``mean``."""
    settings = {
        "threshold": None if threshold is None else shard.block(threshold).clone(),
        "prefixes": config.prefixes,
        "multi_topk": config.multi_topk,
        "k_aux": config.k_aux,
        "auxk_coef": config.auxk_coef,
        "dead_after": config.dead_after,
        "clip": config.clip,
        "mean": mean,
        "scale": scale,
        "shard": shard,
    }
    rule = training_rule(config, d_in=len(mean))
    rows = shard.block(rows)
    if mean.is_cuda and kernels is not None and not config.multi_topk:
        from sae_persona.sae.kernel_step import KernelStep  # here, so that CPU users need no Triton

        weights = Weights(rows, torch.zeros(len(rows)), rows, torch.zeros(len(mean)))
        return KernelStep(weights, rule, config=kernels, rms=rms, device=mean.device, **settings)
    rows = rows.to(mean.device, copy=True)
    weights = Weights(rows.clone(), rows.new_zeros(len(rows)), rows, rows.new_zeros(len(mean)))
    return PlainStep(weights, rule, **settings)
