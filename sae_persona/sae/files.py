"""Reading weights that others wrote: every fault is a FormatError that names the file and the tensor."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_persona.errors import FormatError

Shapes = Mapping[str, tuple[int, ...]]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. FormatError if it is missing, cut short or not of this format."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"cannot read the SAE weights {path}: {error}") from error


def check_tensors(tensors: Mapping[str, Tensor], shapes: Shapes, path: Path, kind: str) -> dict[str, Tensor]:
    """The tensors that ``shapes`` names, in its order. FormatError unless they are these, so shaped and finite.

    kind   what the file holds, for the message
    """
    if set(tensors) != set(shapes):
        raise FormatError(f"{path} must hold {', '.join(shapes)} ({kind}), got {', '.join(tensors) or 'nothing'}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise FormatError(f"{path}: {name} must be {list(shape)} by its config, got {list(tensors[name].shape)}")
        if not tensors[name].isfinite().all():
            raise FormatError(f"{path}: {name} has NaN or infinite values")
    return {name: tensors[name] for name in shapes}


def check_counts(config: object, names: tuple[str, ...], path: Path) -> dict[str, int]:
    """The named entries of a config. FormatError unless it has all of them as whole numbers of at least 1."""
    found = {name: config.get(name) for name in names} if isinstance(config, dict) else {}
    counts = {name: n for name, n in found.items() if isinstance(n, int) and not isinstance(n, bool) and n >= 1}
    if set(counts) != set(names):
        raise FormatError(
            f"{path} is not an SAE config: {' and '.join(names)} must be numbers, got {found or 'no JSON object'}"
        )
    return counts


def check_k(k: object, n_latents: int, path: Path) -> int:
    """FormatError unless a TopK rule can keep ``k`` of so many latents."""
    if not (isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= n_latents):
        raise FormatError(f"{path}: a topk SAE needs k between 1 and {n_latents}, got {k!r}")
    return k


def check_learnt(threshold: float, path: Path) -> float:
    """FormatError unless a BatchTopK SAE has learnt the threshold that takes the place of its batch."""
    if threshold <= 0:
        raise FormatError(
            f"{path} is a BatchTopK SAE whose threshold was never trained ({threshold:g}), so all that is positive "
            "would fire: train it for longer, or take a later checkpoint"
        )
    return threshold
