"""How a training step is computed on a GPU, what memory that takes, and how long it should."""

from dataclasses import dataclass
from typing import Literal, get_args

from sae_persona.errors import ConfigError

Precision = Literal["bf16", "fp8", "fp32"]
Moments = Literal["fp32", "bf16"]
PAD = 16  # d_in is padded to a multiple of it
GRAPH_BELOW = 1e12  # operations of the encoder's product under which launching kernels costs as much as running them


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How a step is computed on a GPU; on a CPU nothing of it matters. ConfigError if a value is out of its range."""

    precision: Precision = "bf16"
    """Of the encoder's product. fp8 (topk only) takes 2 k candidates by e4m3 scores and rescores them from bf16."""
    moments: Moments = "fp32"
    """Of Adam's two moments; bf16 is rounded stochastically and saves a third of the update's traffic."""
    slice_tokens: int | None = None
    """Tokens whose pre-activations are held at once (not with batch_topk, which compares all). None: the batch."""
    overlap: bool = True
    """Update the decoder while the next batch is encoded."""
    graph: bool | None = None
    """Replay the step as a CUDA graph. None: where the step is small."""
    auxk_tokens: float = 0.5
    """Share of a batch's tokens that the AuxK loss is the mean of: the batch is shuffled, so any are as good as all."""
    candidates: float = 2.0
    """fp8: candidates that are rescored, as a multiple of k. With 1.5 recall was 0.9995 or more on planted data."""
    spare: float = 4.0
    """jumprelu: room for entries that fire or are near their threshold, as a multiple of k a token."""
    recall_every: int = 100
    """fp8: steps between two measurements of how much of the true top k it finds."""
    recall_rows: int = 64
    """fp8: tokens in such a measurement."""
    min_recall: float = 0.98
    """fp8: with less, training returns to bf16."""

    def __post_init__(self) -> None:
        for name, allowed in (("precision", get_args(Precision)), ("moments", get_args(Moments))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("slice_tokens", "recall_every", "recall_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("spare", "candidates"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("auxk_tokens", "min_recall"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.auxk_tokens == 0:
            raise ConfigError("auxk_tokens must be above 0, got 0: to train without AuxK set k_aux to 0")


DEFAULT_KERNELS = KernelConfig()


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Rates:
    """What a card reaches: operations a second of the encoder's product in bf16 and e4m3, bytes a second of a copy."""

    bf16: float
    fp8: float
    copy: float


# measured by experiments/bench/step.py in a sustained run; others are taken for an H200
RATES = {
    "H200": Rates(bf16=6.9e14, fp8=1.25e15, copy=4.2e12),
    "H100": Rates(bf16=6.9e14, fp8=1.25e15, copy=3.0e12),
}
STREAMED = 0.86  # of the copy's speed is what the row update reaches
GATHERED = 1.1  # of it, with hits in the cache, is what reading scattered rows reaches
HIDDEN = 0.35  # of the decoder's update is what the next product hides


@dataclass(frozen=True)
class StepPlan:
    """Bytes of memory by what they hold, and milliseconds of a step: of the floor, and predicted."""

    memory: dict[str, float]
    floor_ms: float
    predicted_ms: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    def __str__(self) -> str:
        lines = [f"  {size / 1e6:10,.0f} MB  {name}" for name, size in self.memory.items()]
        lines.append(f"  {self.total / 1e6:10,.0f} MB  in all, without AuxK while no latent is dead")
        lines.append(f"step: {self.predicted_ms:.2f} ms predicted; the floor is {self.floor_ms:.2f} ms")
        return "\n".join(lines)


def plan_step(
    config: KernelConfig, *, n: int, d_in: int, n_latents: int, k: int, rule: str = "topk", n_prefixes: int = 1,
    n_dead: int = 0, card: str = "H200",
) -> StepPlan:  # fmt: skip
    """The memory and time of a step on n tokens, from the sizes of what it holds and reads.

    n_dead   latents in the AuxK loss
    card     name of the GPU, as torch.cuda.get_device_name gives it

    The floor is the encoder's product at the card's rate, and 24 bytes a parameter (weights and both moments in fp32,
    read and written) at the speed of a copy; the prediction is made of what the kernels really move.
    """
    d, fp8 = padded(d_in, PAD), config.precision == "fp8"
    value = 4 if config.precision == "fp32" else 2
    parameters, moment = 2.0 * n_latents * d, 4 if config.moments == "fp32" else 2
    tokens = n if rule == "batch_topk" else min(n, config.slice_tokens or n)
    capacity = n * k * (config.spare if rule == "jumprelu" else 1)
    n_aux = n * config.auxk_tokens if n_dead else 0
    memory = {
        "weights": parameters * 4 + (parameters / 2 if fp8 else 0) + n_latents * 40.0,
        "moments": parameters * 2 * moment,
        "activations and errors": n * d * (value * (1.0 + n_prefixes) + (1 if fp8 else 0)),
        "pre-activations of a slice": tokens * padded(n_latents, 64) * value * (1 + 1 / 32),
        "entries and lists": capacity * (60.0 + 4 * d / 256 + 8 * d / 128),
    }
    if n_dead:
        memory["AuxK"] = n_aux * (n_dead * 3.0 + d) * value + 3.0 * n_dead * d * value
    rates = next((rates for name, rates in RATES.items() if name in card), RATES["H200"])
    product = 2.0 * n * n_latents * d
    floor = product / rates.bf16 + 24.0 * parameters / rates.copy
    moved = parameters * (8.0 + 4 * moment) + (parameters / 2 if fp8 else 0)
    candidates = config.candidates if fp8 else 0
    rows = n * k * d * value * (2 + n_prefixes / 2 + candidates)
    seconds = product / (rates.fp8 if fp8 else rates.bf16)
    update = moved / rates.copy / STREAMED
    if config.overlap and product > GRAPH_BELOW:
        update *= 1 - HIDDEN / 2  # the decoder's half
    seconds += update + rows / rates.copy / GATHERED + 1e-4
    seconds += 8.0 * n_aux * n_dead * d / rates.bf16
    return StepPlan(memory, 1e3 * floor, 1e3 * seconds)
