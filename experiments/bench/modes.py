"""What `step.py` measures: shapes, the modes of our step at each, and how both steps are built from them.

All that depends on the interface of `KernelStep` is here: from `config` to `least_recall`, but for `fresh`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from experiments.bench import planted
from sae_persona.sae.plain_step import PlainStep
from sae_persona.sae.sparsity import BatchTopK, JumpReLU, TopK, TrainingRule
from sae_persona.sae.step import Weights

DEVICE = "cuda"
NEVER = 10**9  # tokens: no latent that begins alive dies within a run
LR = 1e-7  # so small that a measurement ends with the weights that it began with; time does not depend on it
GB = 1e9


@dataclass(frozen=True)
class Shape:
    d_in: int
    n_latents: int
    k: int = 32
    n: int = 8192

    def __str__(self) -> str:
        return f"d_in={self.d_in} n_latents={self.n_latents} k={self.k} batch={self.n}"

    @property
    def weights(self) -> int:
        """How many, in both matrices."""
        return 2 * self.d_in * self.n_latents


@dataclass(frozen=True)
class Mode:
    """``exact`` with what differs. ``dead``: a tenth of the latents; ``prefixes``: nested dictionaries.

    ``auxk_tokens``, ``candidates``: None: KernelConfig's default
    """

    precision: str = "bf16"
    moments: str = "fp32"
    overlap: bool = True
    graph: bool | None = None
    slices: int = 1
    rule: str = "topk"
    clip: float | None = None
    dead: bool = False
    auxk_tokens: float | None = None
    candidates: float | None = None
    prefixes: int = 1

    @property
    def is_topk(self) -> bool:
        """Whether its loss is that of TopK over the whole dictionary."""
        return self.rule == "topk" and not self.dead and self.prefixes == 1


SHAPES = {"S": (768, 24576), "M": (2304, 65536), "L": (4096, 131072)}
MODES = {
    "exact": Mode(),  # KernelConfig's defaults: a graph where the step is small, else overlap
    "serial": Mode(overlap=False, graph=False),
    "graph": Mode(overlap=False, graph=True),
    "bf16_moments": Mode(moments="bf16"),
    "fp8": Mode(precision="fp8"),
    "fp8_all": Mode(precision="fp8", moments="bf16", candidates=1.5),
    "clip": Mode(clip=1.0),
    "auxk": Mode(dead=True),
    "auxk_all": Mode(dead=True, auxk_tokens=1.0),
    "batch_topk": Mode(rule="batch_topk"),
    "jumprelu": Mode(rule="jumprelu"),
    "matryoshka": Mode(prefixes=5),
    "slices": Mode(slices=4),
}
# by name only; a graph replays without overlap
ON_DEMAND = {
    "fp32": Mode(precision="fp32"),  # always checked: it has to agree with `PlainStep` almost to the last bit
    "slices_bf16": Mode(slices=4, moments="bf16"),
}
EVERY = MODES | ON_DEMAND
TARGETS = ["exact", "serial", "graph", "fp8", "fp8_all", "auxk", "auxk_all", "batch_topk", "jumprelu", "matryoshka"]
SWEEP = {
    "M_k64": Shape(2304, 65536, k=64),
    "M_k128": Shape(2304, 65536, k=128),
    "L_k64": Shape(4096, 131072, k=64),
    "L_k128": Shape(4096, 131072, k=128),
    "M_n2048": Shape(2304, 65536, n=2048),
    "M_n32768": Shape(2304, 65536, n=32768),
    "S_k20": Shape(768, 24576, k=20),
    "M_k50": Shape(2304, 65536, k=50),
    "d2304": Shape(2304, 32768),
    "d3584": Shape(3584, 65536),
    "d5120": Shape(5120, 65536),
    "ragged": Shape(2304, 65500),
    "ragged_k50": Shape(768, 24563, k=50),
    "million": Shape(4096, 2**20),
}


def names_of(text: str) -> list[str]:
    """The modes that ``--modes`` asks for. ValueError if there is no such mode."""
    names = list(MODES) if text == "all" else TARGETS if text == "targets" else text.split(",")
    if unknown := [name for name in names if name not in EVERY]:
        raise ValueError(f"there is no mode {', '.join(unknown)}: choose all, targets, or of {', '.join(EVERY)}")
    return names


def config(mode: Mode, n: int) -> Any:
    from sae_persona.sae.kernel_plan import KernelConfig

    return KernelConfig(
        precision=mode.precision,
        moments=mode.moments,
        slice_tokens=None if mode.slices == 1 else n // mode.slices,
        overlap=mode.overlap,
        graph=mode.graph,
        **{name: value for name in ("auxk_tokens", "candidates") if (value := getattr(mode, name)) is not None},
    )


def kernel_step(mode: Mode, shape: Shape, weights: Weights, x: Tensor) -> Any:
    """A KernelStep, which takes over the memory of the weights."""
    from sae_persona.sae.kernel_step import KernelStep

    rest = _arguments(mode, shape, weights, x)
    step = KernelStep(weights, _rule(mode, shape), config=config(mode, shape.n), **rest)
    return _with_dead(mode, step)


def plain_step(mode: Mode, shape: Shape, weights: Weights, x: Tensor) -> PlainStep:
    """The reference of the same mode, which trains the weights in place."""
    return _with_dead(mode, PlainStep(weights, _rule(mode, shape), **_arguments(mode, shape, weights, x)))


def until_dead_are_known() -> int:
    """Steps after which `KernelStep` knows how many latents are dead: before, it has no AuxK."""
    from sae_persona.sae.kernel_auxk import EVERY as LATE

    return LATE


def warm_steps(mode: Mode) -> int:
    """Steps after which a mode does all that it ever does: AuxK, its graph, and with fp8 its recall is known."""
    if mode.precision != "fp8":
        return until_dead_are_known() + 4
    return 2 * config(mode, 1).recall_every + 1


def recall(step: Any) -> float | None:
    """What share of the true top k was found, where that is measured."""
    return getattr(step, "recall", None)


def least_recall(mode: Mode) -> float:
    """With less, fp8 has returned to bf16, and what is timed is not what it is called."""
    return config(mode, 1).min_recall


def fresh(dictionary: Tensor, *, dead: bool = False, give: bool = False) -> Weights:
    """Weights that are the dictionary in encoder and decoder, with biases 0. ``give``: it becomes the decoder itself.

    ``dead``  the encoder rows of every tenth latent are shrunk, so that they never fire
    """
    w_enc = dictionary.clone()
    if dead:
        w_enc[::10] *= 0.01
    w_dec = dictionary if give else dictionary.clone()
    return Weights(w_enc, dictionary.new_zeros(len(dictionary)), w_dec, dictionary.new_zeros(dictionary.shape[1]))


def call_of(step: Any) -> Callable[[Tensor], Any]:
    """One training step with the benchmark's learning rate."""
    return lambda x: step(x, LR)


def memory(mode: Mode, shape: Shape) -> float:
    """Bytes that a mode needs, estimated: while it is made the fp32 weights are there, too; later pre-activations."""
    moments = 8 if mode.moments == "fp32" else 4
    a_weight = 4 + moments + (0.5 if mode.precision == "fp8" else 0)
    pre = shape.n / mode.slices * shape.n_latents * (4.2 if mode.precision == "fp32" else 2.1)
    entries = shape.n * shape.k * 64 * (4 if mode.rule == "jumprelu" else 1)
    dead = 0.1 * shape.n_latents * (shape.n * 6 + shape.d_in * 24) if mode.dead else 0
    recall = shape.weights * 2 if mode.precision == "fp8" else 0
    stepping = pre + entries + shape.n * shape.d_in * 6 * (1 + mode.prefixes) + dead + recall
    return shape.weights * a_weight + max(shape.weights * 4, stepping) + 0.3 * GB


def data(shape: Shape, n_batches: int = 4) -> tuple[Tensor, list[Tensor]]:
    """The dictionary fp32, and batches bf16."""
    dictionary = planted.atoms(shape.n_latents, shape.d_in, seed=0, device=DEVICE)
    return dictionary, [planted.batch(dictionary, shape.n, seed=1 + i) for i in range(n_batches)]


def _rule(mode: Mode, shape: Shape) -> TrainingRule:
    if mode.rule == "jumprelu":
        return JumpReLU(shape.k, 0.5, float(shape.d_in))  # TrainConfig's bandwidth and sparsity_coef
    return BatchTopK(shape.k) if mode.rule == "batch_topk" else TopK(shape.k)


def _arguments(mode: Mode, shape: Shape, weights: Weights, x: Tensor) -> dict[str, Any]:
    threshold = None
    if mode.rule == "jumprelu":
        some = x[:512].float() @ weights.w_enc.T
        level = some.flatten().topk(len(x[:512]) * shape.k).values.min()
        threshold = level.repeat(shape.n_latents)
    prefixes = tuple(shape.n_latents >> i for i in reversed(range(mode.prefixes))) if mode.prefixes > 1 else ()
    never = {"k_aux": None, "auxk_coef": 1 / 32, "dead_after": NEVER}
    return {"threshold": threshold, "prefixes": prefixes, "clip": mode.clip, **never}


def _with_dead(mode: Mode, step: Any) -> Any:
    if mode.dead:
        step.silent[::10] = NEVER
    return step
