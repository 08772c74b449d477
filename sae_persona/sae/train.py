"""Train an SAE on any iterable of activation batches."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from sae_persona.errors import ConfigError, DataError, RunError
from sae_persona.sae.kernel_plan import DEFAULT_KERNELS, KernelConfig
from sae_persona.sae.model import SAE
from sae_persona.sae.plain_step import PlainStep
from sae_persona.sae.sparsity import BatchTopK, JumpReLU, ReLU, Rule, Threshold, TopK, TrainingRule, calibrate
from sae_persona.sae.step import Measured, Step, Weights

HEAD = 8  # batches that give the mean, the scale and the first thresholds
TAIL = 8  # batches that the last threshold is calibrated on
RuleName = Literal["batch_topk", "topk", "jumprelu"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train an SAE. ConfigError if a value is out of its range."""

    n_latents: int = 4096
    """Width of the dictionary."""
    k: int = 32
    """Latents kept per token: with batch_topk on average, with jumprelu as the mean that is aimed at."""
    rule: RuleName = "batch_topk"
    """Who shares the k: the tokens of a batch (batch_topk), nobody (topk), or all tokens, with a trained threshold for
    each latent (jumprelu). batch_topk becomes a threshold at the end."""
    prefixes: tuple[int, ...] = ()
    """Rising sizes of nested dictionaries, each of which has to rebuild the activations alone; the last is n_latents.
    None given: only the whole. Matryoshka, 2503.17547."""
    steps: int | None = None
    """Batches to train on, starting over when they end. None: each batch once."""
    lr: float | None = None
    """Highest learning rate of Adam. None: 2e-4 * sqrt(2**14 / n_latents), after 2406.04093."""
    warmup: int = 50
    """Steps over which the learning rate rises from 0."""
    decay: float = 0.3
    """Share of the steps, at the end, over which it falls to 0. Without effect while the number is not known."""
    k_aux: int | None = None
    """Dead latents per token in the AuxK loss. None: d_in // 2. 0: no AuxK."""
    auxk_coef: float = 1 / 32
    """Weight of the AuxK loss."""
    dead_after: int = 100_000
    """Tokens without firing after which a latent is dead."""
    clip: float | None = None
    """Norm that all gradients of a step together are cut to. None: they are not."""
    bandwidth: float = 0.5
    """jumprelu: width of the window around a threshold in which pre-activations train it, in units of activations
    scaled to norm sqrt(d_in). Measured: FVU as batch_topk's or lower from 0.2 to 2; with 0.05, up to 1.15 times that
    and a third of the latents dead; steps with 2 take four times as long on a CPU."""
    sparsity_coef: float = 1.0
    """jumprelu: weight of the loss (L0 / k - 1)^2, as a multiple of the activations' variance; 1 as in
    dictionary_learning. Measured: with 0.3 L0 ends 3 to 14 % above k, with 1 up to 7 %, with 3 up to 5 %."""
    seed: int = 0
    """Of the first weights."""
    log_every: int = 10
    """Steps between two lines of metrics."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.n_latents:
            raise ConfigError(f"k must be between 1 and n_latents = {self.n_latents}, got {self.k}")
        if self.rule not in get_args(RuleName):
            raise ConfigError(f"rule must be one of {', '.join(get_args(RuleName))}, got {self.rule!r}")
        if self.prefixes and not _rise_to(self.n_latents, self.prefixes):
            raise ConfigError(f"prefixes must rise from 1 or more to n_latents = {self.n_latents}, got {self.prefixes}")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay is a share between 0 and 1, got {self.decay}")
        for name, least in (("steps", 1), ("dead_after", 1), ("log_every", 1), ("warmup", 0), ("k_aux", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        for name in ("lr", "auxk_coef", "sparsity_coef", "bandwidth", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be a finite number, not below 0, got {value}")
            if value == 0 and name in ("bandwidth", "clip"):
                raise ConfigError(f"{name} must be above 0, got {value}: nothing would be trained")

    @property
    def peak_lr(self) -> float:
        """``lr``, or what it stands for."""
        return 2e-4 * math.sqrt(2**14 / self.n_latents) if self.lr is None else self.lr

    def lr_at(self, step: int, total: int | None) -> float:
        """Learning rate of a step, counted from 0, of ``total`` (None: not known, so no decay)."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = 1.0 if total is None or self.decay == 0 else min(1.0, (total - step) / (self.decay * total))
        return self.peak_lr * rise * fall


def _rise_to(last: int, sizes: tuple[int, ...]) -> bool:
    return sizes[0] >= 1 and sizes[-1] == last and all(a < b for a, b in pairwise(sizes))


def train(
    batches: Iterable[Tensor],
    config: TrainConfig,
    *,
    kernels: KernelConfig | None = DEFAULT_KERNELS,
    out: Path | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> SAE:
    """Train an SAE on batches [n, d_in] of activations; the device is theirs.

    On a CUDA device a step runs through the Triton kernels, as ``kernels`` says; None: in plain torch, as on a CPU.

    The first batches give a mean and a scale (mean squared norm d_in), so that training starts centred and learning
    rates mean the same on every model; both are folded away at the end, and the SAE reads raw activations. With
    batch_topk it ends as a Threshold calibrated to k latents a token over the last batches, with jumprelu as the
    Threshold that was trained, from one calibrated over the first.

    Every ``log_every`` steps, and after the last, one line goes to ``out`` (a metrics.jsonl) and to ``on_step``: step,
    tokens, loss, auxk and with jumprelu sparsity (their shares of the loss), fvu, l0, dead (share), lr, tokens_per_s.
    ``progress`` draws a bar on stderr. The same batches and config give the same bits.

    DataError: no batch, too few for ``steps``, another shape, NaN or infinity, all rows equal. Diverged: the loss is no
    longer finite, or activations on a GPU are not, where it is seen a line of metrics later; it carries the SAE of the
    last good step. RunError: ``out`` cannot be written.
    """
    source = _batches(batches, config.steps)
    head = list(islice(source, HEAD))
    mean, scale = _mean_and_scale(head)
    total = config.steps or (len(batches) if isinstance(batches, Sized) else None)
    step = _start(config, head, mean, scale, kernels)
    tail: deque[Tensor] = deque(maxlen=TAIL)
    with _log(out) as file, tqdm(total=total, unit="step", disable=not progress, dynamic_ncols=True) as bar:
        meter = _Meter(config, file, on_step, bar)
        try:
            for i, batch in enumerate(chain(head, source)):
                lr = config.lr_at(i, total)
                meter.update(len(batch), step(batch, lr), step, lr)
                tail.append(batch)
            meter.close()
        except _NotFinite as error:
            raise Diverged(str(error), _last_good(step, mean, scale, config, tail or head, meter.tokens)) from None
    return _finish(step, mean, scale, config, list(tail), meter.tokens)


class Diverged(RunError):
    """Training met a loss that is not finite; ``sae`` is what the last good step left, None if that is no use."""

    def __init__(self, message: str, sae: SAE | None) -> None:
        super().__init__(message)
        self.sae = sae


class _NotFinite(Exception):
    """What is wrong, before there is an SAE to carry."""


def _batches(batches: Iterable[Tensor], steps: int | None) -> Iterator[Tensor]:
    """Checked batches, on a CPU fp32: each once, or ``steps`` of them, starting over when they end."""
    served, width = 0, None
    while True:
        before = served
        for batch in batches:
            _check(batch, served, width)
            width = batch.shape[1]
            yield batch if batch.is_cuda else batch.float()
            served += 1
            if served == steps:
                return
        if served == 0:
            raise DataError("there is no batch to train on: look at the texts, or at the list of batches")
        if steps is None:
            return
        if served == before:
            raise DataError(f"the batches ended after {served} of {steps} steps: give a list, a stream, or fewer steps")


def _check(batch: Tensor, number: int, width: int | None) -> None:
    """DataError unless the batch is finite floats [n, width], n at least 1."""
    right = batch.ndim == 2 and len(batch) > 0 and batch.shape[1] == (width or batch.shape[1])
    if not right or not batch.is_floating_point():
        wanted = f"[n, {width or 'd_in'}]"
        raise DataError(f"batch {number} must be floats {wanted}, got {batch.dtype} {list(batch.shape)}")
    # on a GPU the step finds out, without making the host wait
    if not batch.is_cuda and not batch.isfinite().all():
        raise DataError(f"batch {number} has NaN or infinite activations: load the model with dtype float32")


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


def _start(
    config: TrainConfig, head: Sequence[Tensor], mean: Tensor, scale: float, kernels: KernelConfig | None
) -> Step:
    """Random unit decoder rows, the encoder their transpose, biases 0: 2406.04093 A.1."""
    generator = torch.Generator().manual_seed(config.seed)
    rows = torch.nn.functional.normalize(torch.randn(config.n_latents, len(mean), generator=generator), dim=1)
    threshold = None
    if config.rule == "jumprelu":
        w_enc = rows.to(mean.device)
        level = calibrate(lambda x: (x - mean) * scale @ w_enc.T, head, config.k)
        threshold = torch.full((config.n_latents,), level, device=mean.device)
    settings = {
        "threshold": threshold,
        "prefixes": config.prefixes,
        "k_aux": config.k_aux,
        "auxk_coef": config.auxk_coef,
        "dead_after": config.dead_after,
        "clip": config.clip,
        "mean": mean,
        "scale": scale,
    }
    rule = _training_rule(config, d_in=len(mean))
    if mean.is_cuda and kernels is not None:
        from sae_persona.sae.kernel_step import KernelStep  # here, so that CPU users need no Triton

        rms = None
        if kernels.precision == "fp8":
            rms = ((torch.cat(list(head)).float() - mean) * scale).square().mean(dim=0).sqrt()
        weights = Weights(rows, torch.zeros(config.n_latents), rows, torch.zeros(len(mean)))
        return KernelStep(weights, rule, config=kernels, rms=rms, device=mean.device, **settings)
    rows = rows.to(mean.device)
    weights = Weights(rows.clone(), rows.new_zeros(config.n_latents), rows, rows.new_zeros(len(mean)))
    return PlainStep(weights, rule, **settings)


def _training_rule(config: TrainConfig, *, d_in: int) -> TrainingRule:
    if config.rule == "jumprelu":
        # scaled activations have a variance of d_in
        return JumpReLU(config.k, config.bandwidth, config.sparsity_coef * d_in)
    return BatchTopK(config.k) if config.rule == "batch_topk" else TopK(config.k)


class _Meter:
    """Counts steps and tokens, and tells the file, the caller and the bar how training goes."""

    def __init__(
        self, config: TrainConfig, file: TextIO | None, on_step: Callable[[dict[str, Any]], None] | None, bar: tqdm
    ) -> None:
        self.config, self.file, self.on_step, self.bar = config, file, on_step, bar
        self.steps = self.tokens = 0
        self.start = time.perf_counter()
        self.latest: tuple[Measured, Step, float] | None = None

    def update(self, n: int, seen: Measured, step: Step, lr: float) -> None:
        """Count a step on ``n`` tokens; tell of it when it is its turn."""
        self.steps += 1
        self.tokens += n
        self.bar.update()
        self.latest = seen, step, lr
        if self.steps % self.config.log_every == 0:
            self._tell(*self.latest)

    def close(self) -> None:
        """Tell of the last step, and end the bar at 100 % whatever number of batches came."""
        if self.latest is not None:
            self._tell(*self.latest)
        self.bar.total = self.bar.n
        self.bar.refresh()

    def _tell(self, seen: Measured, step: Step, lr: float) -> None:
        self.latest = None
        values = seen.measures()
        advice = f"lower lr, now {self.config.peak_lr:g}, or look for NaN in the activations"
        if not math.isfinite(values["loss"]):
            raise _NotFinite(f"the loss is {values['loss']} at step {self.steps}: {advice}")
        if step.flagged:
            raise _NotFinite(f"the loss was not finite in {step.flagged} of {self.steps} steps: {advice}")
        values["dead"] = step.dead.float().mean().item()
        rate = self.tokens / (time.perf_counter() - self.start)
        shown = {name: f"{values[name]:.3g}" for name in ("loss", "fvu", "l0", "dead")}
        self.bar.set_postfix({**shown, "tokens_per_s": f"{rate:.0f}"}, refresh=False)
        line = {"step": self.steps, "tokens": self.tokens, **values, "lr": lr, "tokens_per_s": round(rate)}
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.on_step is not None:
            self.on_step(line)


def _log(out: Path | None) -> AbstractContextManager[TextIO | None]:
    if out is None:
        return nullcontext()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return out.open("w", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}. Choose another --out.") from error


@torch.no_grad()
def _last_good(
    step: Step, mean: Tensor, scale: float, config: TrainConfig, batches: Iterable[Tensor], tokens: int
) -> SAE | None:
    """The SAE of the last step that was good; None if its weights are so large that nothing finite comes of them."""
    good = [batch for batch in batches if batch.isfinite().all()]
    w_enc = step.weights.w_enc
    if not good or not ((good[0] - mean) * scale @ w_enc.T).isfinite().all():
        return None
    return _finish(step, mean, scale, config, good, tokens)


@torch.no_grad()
def _finish(step: Step, mean: Tensor, scale: float, config: TrainConfig, tail: list[Tensor], tokens: int) -> SAE:
    """Fold mean and scale into the weights, so that the SAE reads raw activations, and choose the final rule."""
    w_enc, b_enc, w_dec, b_dec = step.weights
    # in fp64: the mean may be far larger than what is left after subtracting it
    b_enc = (b_enc.double() / scale - w_enc.double() @ mean.double()).float()
    b_dec = b_dec / scale + mean
    rule: Rule = TopK(config.k)
    if step.threshold is not None:
        rule = Threshold(step.threshold / scale)  # as pre-activations: w_enc stays, b_enc is divided
    elif config.rule == "batch_topk":
        level = calibrate(SAE(w_enc, b_enc, w_dec, b_dec, ReLU()).pre_acts, tail, config.k)
        rule = Threshold(torch.full_like(b_enc, level))
    sae = SAE(w_enc, b_enc, w_dec, b_dec, rule)
    l0 = torch.cat([sae.encode(x).l0() for x in tail]).double().mean().item()
    dead = int(step.dead.sum())
    training = {**asdict(config), "prefixes": list(config.prefixes)}  # as JSON would give them back
    sae.metadata = {"training": training, "n_tokens": tokens, "l0": l0, "num_dead_features": dead}
    return sae
