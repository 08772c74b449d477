"""dictionary_learning's layout: ``config.json`` and ``ae.pt``. Its words stay in this file.

    AutoEncoder              encoder.weight [n_latents, d_in], encoder.bias, decoder.weight [d_in, n_latents], bias
    AutoEncoderNew           the same with decoder.bias, and no bias is subtracted from x
    AutoEncoderTopK          encoder and decoder as above, b_dec; k and threshold are numbers
    BatchTopKSAE             the same
    MatryoshkaBatchTopKSAE   W_enc [d_in, n_latents], b_enc, W_dec [n_latents, d_in], b_dec; k, threshold, group_sizes
    JumpReluAutoEncoder      W_enc, b_enc, W_dec, b_dec, threshold [n_latents]; no bias is subtracted from x
    GatedAutoEncoder         encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias, mag_bias

BatchTopK ones fire above their one threshold, which is -1 until it is trained. ``ae.pt`` is read with weights_only, so
a pickle that would run code is refused. Saved weights have the scale of the training's normalisation in their biases.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_persona.errors import FormatError
from sae_persona.sae.files import check_counts, check_k, check_learnt, check_tensors
from sae_persona.sae.folding import RawSAE, gated
from sae_persona.sae.model import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
ARCHITECTURES = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "gated",
}
UNREAD = ("k", "group_sizes")  # buffers that the config tells too, or that only training needs
HOOK = r"resid_(post|pre|out)_layer_?(\d+)"


def wrote(config: Any) -> bool:
    """Whether a ``config.json`` is dictionary_learning's, and not a language model's."""
    return isinstance(config, dict) and isinstance(config.get("trainer"), dict)


def read(config: dict[str, Any], folder: Path) -> SAE:
    """The SAE of a folder whose config was read.

    FormatError: another class of dictionary, a pickle with code in it, missing tensors, wrong shapes, NaN, a threshold
    that was never trained.
    """
    trainer = _checked(config, folder)
    path, kind = folder / WEIGHTS, trainer["dict_class"]
    tensors = {name: tensor for name, tensor in _load(path).items() if name not in UNREAD}
    if kind == "AutoEncoderTopK":
        tensors.pop("threshold", None)  # older files have none; it chooses its k for each token
    t = check_tensors(tensors, _shapes(kind, trainer["activation_dim"], trainer["dict_size"]), path, kind)
    raw = _raw(kind, t, trainer, path)
    return (raw if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else raw.centred()).finished(_metadata(trainer))


def facts(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the config alone tells, in our words; None for what it does not say."""
    trainer = _checked(config, folder)
    metadata = _metadata(trainer)
    return {
        "format": "dictionary_learning",
        "architecture": ARCHITECTURES[trainer["dict_class"]],
        "d_in": trainer["activation_dim"],
        "d_out": trainer["activation_dim"],
        "n_latents": trainer["dict_size"],
        "k": trainer.get("k"),
        "hook": metadata.get("hook", trainer.get("submodule_name")),
        "model": metadata.get("model"),
        "l0": None,
        "tokens": None,
        "dead": None,
        "normalisation": "none",
        "dtype": None,
    }


def _raw(kind: str, t: dict[str, Tensor], trainer: dict[str, Any], path: Path) -> RawSAE:
    if kind == "GatedAutoEncoder":
        gates = t["gate_bias"], t["mag_bias"], t["r_mag"]
        return gated(t["encoder.weight"], *gates, t["decoder.weight"].T, t["decoder_bias"])
    if "W_enc" in t:
        weights = t["W_enc"].T, t["b_enc"], t["W_dec"], t["b_dec"]
    else:
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
        weights = t["encoder.weight"], t["encoder.bias"], t["decoder.weight"].T, t[bias]
    threshold = t.get("threshold")
    if threshold is not None and threshold.ndim == 0:
        threshold = torch.full((trainer["dict_size"],), check_learnt(threshold.item(), path))
    return RawSAE(*weights, k=trainer["k"] if kind == "AutoEncoderTopK" else None, threshold=threshold)


def _checked(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    trainer, path = config["trainer"], folder / CONFIG
    kind = trainer.get("dict_class")
    if kind not in ARCHITECTURES:
        raise FormatError(f"{path} has dict_class {kind!r}, this version reads {', '.join(ARCHITECTURES)}")
    check_counts(trainer, ("activation_dim", "dict_size"), path)
    if kind == "AutoEncoderTopK":
        check_k(trainer.get("k"), trainer["dict_size"], path)
    return trainer


def _load(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path} is no plain state dict, and a pickle may hold code, so it is not read: {_first_line(error)}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise FormatError(f"cannot read the SAE weights {path}: {_first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise FormatError(f"{path} must hold a state dict, names with tensors, got {type(found).__name__}")
    return found


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _shapes(kind: str, d_in: int, n_latents: int) -> dict[str, tuple[int, ...]]:
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        shapes = {"W_enc": (d_in, n_latents), "b_enc": (n_latents,), "W_dec": (n_latents, d_in), "b_dec": (d_in,)}
        return shapes | {"threshold": (n_latents,) if kind == "JumpReluAutoEncoder" else ()}
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (n_latents, d_in), "decoder.weight": (d_in, n_latents)}
    if kind == "GatedAutoEncoder":
        return shapes | {"decoder_bias": (d_in,)} | dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), (n_latents,))
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
    shapes |= {"encoder.bias": (n_latents,), bias: (d_in,)}
    return shapes | ({"threshold": ()} if kind == "BatchTopKSAE" else {})


def _metadata(trainer: dict[str, Any]) -> dict[str, Any]:
    """What the trainer says of itself; ``hook`` only where the submodule's name tells the site."""
    metadata: dict[str, Any] = {"trainer": trainer}
    if isinstance(trainer.get("lm_name"), str):
        metadata["model"] = trainer["lm_name"]
    if named := re.fullmatch(HOOK, str(trainer.get("submodule_name"))):
        metadata["hook"] = f"layers.{named[2]}.{'resid_pre' if named[1] == 'pre' else 'resid_post'}"
    return metadata
