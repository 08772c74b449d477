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
    """Replay the step as a CUDA graph. None: where the step is small, and no latent is dead."""
    auxk_tokens: float = 0.5
    """Share of a batch's tokens that the AuxK loss is the mean of: the batch is shuffled, so any are as good as all."""
    candidates: float = 2.0
    """fp8: candidates that are rescored, as a multiple of k. With 1.5 steps are up to 3 % faster, recall 0.999."""
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


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
