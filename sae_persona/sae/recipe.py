"""How an SAE is trained: every setting with its default, and what follows from them step by step."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from sae_persona.errors import ConfigError
from sae_persona.sae.sparsity import BatchTopK, JumpReLU, TopK, TrainingRule, k_at

RuleName = Literal["batch_topk", "topk", "jumprelu"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train an SAE. ConfigError if a value is out of its range."""

    n_latents: int = 4096
    """Width of the dictionary. A choice for small models; sparsify takes 32 times the model's width."""
    k: int = 32
    """Latents kept per token: with batch_topk on average, with jumprelu as the mean that is aimed at. 32 as in
    sparsify."""
    rule: RuleName = "batch_topk"
    """Who shares the k: the tokens of a batch (batch_topk), nobody (topk), or all tokens, with a trained threshold for
    each latent (jumprelu). batch_topk becomes a threshold at the end. 2412.06410, 2406.04093, 2407.14435."""
    k_start: int | None = None
    """k of the first step, from which it falls to ``k``. None: it is ``k`` throughout, as in dictionary_learning, whose
    annealing this is."""
    k_anneal: float = 0.2
    """Share of the steps over which k falls, along a line. Without effect while the number is not known."""
    multi_topk: bool = False
    """topk: train the 4 k largest latents of a token to rebuild it, too, with an eighth of the weight; keeps the error
    falling where more latents are used than trained for. 2406.04093 5.3; off, as in sparsify. In plain torch only."""
    prefixes: tuple[int, ...] = ()
    """Rising sizes of nested dictionaries, each of which has to rebuild the activations alone; the last is n_latents.
    None given: only the whole. Matryoshka, 2503.17547."""
    steps: int | None = None
    """Batches to train on, starting over when they end. None: each batch once."""
    lr: float | None = None
    """Highest learning rate of Adam. None: 2e-4 * sqrt(2**14 / n_latents), after 2406.04093."""
    warmup: int = 50
    """Steps over which the learning rate rises from 0. A choice for runs of some hundred steps; dictionary_learning and
    sparsify take 1000."""
    decay: float = 0.3
    """Share of the steps, at the end, over which it falls to 0. A choice; Anthropic's April 2024 update takes 0.2.
    Without effect while the number is not known."""
    k_aux: int | None = None
    """Dead latents per token in the AuxK loss. None: d_in // 2, after 2406.04093. 0: no AuxK."""
    auxk_coef: float = 1 / 32
    """Weight of the AuxK loss: 2406.04093 A.2."""
    dead_after: int = 100_000
    """Tokens without firing after which a latent is dead. A choice for runs of a few million tokens; where there are
    billions peers take 10M."""
    clip: float | None = None
    """Norm that all gradients of a step together are cut to. None: they are not. dictionary_learning takes 1."""
    bandwidth: float = 0.5
    """jumprelu: width of the window around a threshold in which pre-activations train it, in units of activations
    scaled to norm sqrt(d_in). Measured: FVU as batch_topk's or lower from 0.2 to 2; with 0.05, up to 1.15 times that
    and a third of the latents dead; steps with 2 take four times as long on a CPU."""
    sparsity_coef: float = 1.0
    """jumprelu: weight of the loss (L0 / k - 1)^2, as a multiple of the activations' variance; 1 as in
    dictionary_learning. Measured: with 0.3 L0 ends 3 to 14 % above k, with 1 up to 7 %, with 3 up to 5 %."""
    calibration_tokens: int = 16_384
    """batch_topk: activations after the last step that set the threshold; if there are fewer, the last ones of training
    stand in. Measured: 8,192 leave L0 elsewhere within 0.7 % of k, 2,048 within 1.9 % (calibration.py)."""
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
        if self.k_start is not None and not 1 <= self.k_start <= self.n_latents:
            raise ConfigError(f"k_start must be between 1 and n_latents = {self.n_latents}, got {self.k_start}")
        if not 0 <= self.k_anneal <= 1:
            raise ConfigError(f"k_anneal is a share between 0 and 1, got {self.k_anneal}")
        if self.multi_topk and (self.rule != "topk" or self.prefixes):
            raise ConfigError(
                f"multi_topk is for rule topk without prefixes, got rule {self.rule}: leave one of them out"
            )
        for name, least in (
            ("calibration_tokens", 1),
            ("steps", 1),
            ("dead_after", 1),
            ("log_every", 1),
            ("warmup", 0),
            ("k_aux", 0),
        ):
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

    def k_at(self, step: int, total: int | None) -> int:
        """k of a step, counted from 0, of ``total`` (None: not known, so ``k``)."""
        return k_at(step, total, self.k, self.k if self.k_start is None else self.k_start, self.k_anneal)

    def lr_at(self, step: int, total: int | None) -> float:
        """Learning rate of a step, counted from 0, of ``total`` (None: not known, so no decay)."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = 1.0 if total is None or self.decay == 0 else min(1.0, (total - step) / (self.decay * total))
        return self.peak_lr * rise * fall


def _rise_to(last: int, sizes: tuple[int, ...]) -> bool:
    return sizes[0] >= 1 and sizes[-1] == last and all(a < b for a, b in pairwise(sizes))


def training_rule(config: TrainConfig, *, d_in: int) -> TrainingRule:
    """The rule that a step holds; activations are scaled to a variance of d_in."""
    if config.rule == "jumprelu":
        return JumpReLU(config.k, config.bandwidth, config.sparsity_coef * d_in)
    return BatchTopK(config.k) if config.rule == "batch_topk" else TopK(config.k)
