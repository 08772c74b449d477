"""One vector from a file, without pickle."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_persona.errors import DataError, FormatError


def read_vector(path: Path) -> Tensor:
    """The vector [d] fp32 of a .npy or .safetensors file that holds one: [d] or [1, d].

    FormatError for another kind of file or one that cannot be read, DataError for several tensors or another shape.
    """
    if path.suffix == ".npy":
        try:
            found = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        except (OSError, ValueError, TypeError) as error:
            raise FormatError(f"cannot read a vector from {path}: {error}") from error
    elif path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FormatError(f"cannot read a vector from {path}: {error}") from error
        if len(tensors) != 1:
            raise DataError(f"{path} holds {len(tensors)} tensors ({', '.join(sorted(tensors))}), wanted one vector")
        (found,) = tensors.values()
    else:
        raise FormatError(f"a vector is read from a .npy or .safetensors file, got {path}")
    if found.dim() == 2 and len(found) == 1:
        found = found[0]
    if found.dim() != 1:
        raise DataError(f"{path} holds a tensor of shape {list(found.shape)}, wanted a vector [d]")
    return found.float()
