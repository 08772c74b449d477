"""SAELens' layout: ``cfg.json`` and ``sae_weights.safetensors``. Its words stay in this file.

    W_enc [d_in, n_latents]    W_dec [n_latents, d_out]    b_enc, b_dec    threshold (jumprelu)    W_skip [d_out, d_in]
    architecture               standard = ReLU, topk = TopK, jumprelu = Threshold; gated = `folding.gated`; a name
                               with transcoder; batchtopk, matryoshka_batchtopk = a checkpoint of SAELens' training,
                               whose topk_threshold becomes a Threshold
    apply_b_dec_to_input       they encode x - b_dec
    rescale_acts_by_decoder_norm    their activations times the norms of the decoder rows, which have not norm 1
    normalize_activations      what their input was multiplied by, see `folding`. A checkpoint that says
                               expected_average_only_in or covariance_whitening was not folded: by what stands in
                               activation_scaler.json and activation_whitening.safetensors, beside it

Written are standard, topk, jumprelu and their transcoders, all folded, so that any SAELens user reads them.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_persona.errors import FormatError
from sae_persona.runs import read_json, write_whole
from sae_persona.sae.files import check_counts, check_k, check_learnt, check_tensors, read_safetensors
from sae_persona.sae.folding import RawSAE, gated
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Threshold, TopK

VERSION = "6.54.12"  # whose layout this is; without a version SAELens drops the metadata at load
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", *TRANSCODERS, *BATCH_TOPK)
WRITTEN = {
    (ReLU, False): "standard",
    (TopK, False): "topk",
    (Threshold, False): "jumprelu",
    (ReLU, True): "transcoder",
    (Threshold, True): "jumprelu_transcoder",
}
HOOK = r"blocks\.(\d+)\.hook_(resid_pre|resid_post)"
BLOCK = r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)"  # a block's module path in Hugging Face: its output


def write(sae: SAE, folder: Path, metadata: dict[str, Any]) -> None:
    """Write ``sae``, whole or not at all. FormatError where SAELens has no such kind, RunError if the disk refuses."""
    architecture = WRITTEN.get((type(sae.rule), sae.transcodes))
    if architecture is None or (sae.w_skip is not None and not sae.transcodes):
        raise FormatError("SAELens' layout has no TopK transcoder and no skip connection in an SAE: it is read only")
    tensors = {"W_enc": sae.w_enc.T, "W_dec": sae.w_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION, **metadata},
    }
    if sae.transcodes:
        config |= {"d_out": sae.d_out}
    if sae.w_skip is not None:
        config["architecture"] = architecture.replace("transcoder", "skip_transcoder")
        tensors["W_skip"] = sae.w_skip
    if isinstance(sae.rule, TopK):
        config |= {"k": sae.rule.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(sae.rule, Threshold):
        tensors["threshold"] = sae.rule.threshold
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}

    def fill(temporary: Path) -> None:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS)

    write_whole(folder, fill, mark=CONFIG)


def read(config: Any, folder: Path) -> SAE:
    """The SAE of a folder whose config was read."""
    return build(config, read_safetensors(folder / WEIGHTS), folder)


def build(config: Any, tensors: dict[str, Tensor], folder: Path) -> SAE:
    """An SAE from its config and tensors. ``folder`` is for messages, and where the scaler of a checkpoint stands.

    FormatError: another architecture, missing tensors, wrong shapes, an input normalisation that cannot be folded.
    """
    config = _checked(_modern(config), folder)
    architecture, path = config["architecture"], folder / WEIGHTS
    t = check_tensors(_renamed(tensors), _shapes(config), path, architecture)
    w_enc, w_dec, b_dec = t["W_enc"].T, t["W_dec"], t["b_dec"]
    if architecture == "gated":
        raw = gated(w_enc, t["b_gate"], t["b_mag"], t["r_mag"], w_dec, b_dec)
    else:
        k = config["k"] if architecture == "topk" else None
        skip, transcodes = t.get("W_skip"), architecture in TRANSCODERS
        raw = RawSAE(w_enc, t["b_enc"], w_dec, b_dec, k, t.get("threshold"), transcodes, skip)
    if config.get("apply_b_dec_to_input", True) and not raw.transcodes:  # whose b_dec is of another place
        raw = raw.centred()
    if config.get("rescale_acts_by_decoder_norm", False):
        raw = raw.unit_rows()  # before anything else changes the norms that their rule went by
    if architecture in BATCH_TOPK:
        level = check_learnt(t["topk_threshold"].item(), path)
        raw = replace(raw, threshold=torch.full((len(raw.b_enc),), level, dtype=torch.float64))
    return _folded(raw, config, folder).finished(_metadata(config))


def facts(config: Any, folder: Path) -> dict[str, Any]:
    """What the config alone tells, in our words; None for what it does not say."""
    config = _checked(_modern(config), folder)
    metadata = _metadata(config)
    return {
        "format": "SAELens",
        "architecture": config["architecture"],
        "d_in": config["d_in"],
        "d_out": config.get("d_out", config["d_in"]),
        "n_latents": config["d_sae"],
        "k": config.get("k", _part(metadata, "training").get("k")),
        "hook": metadata.get("hook", metadata.get("hook_name")),
        "model": metadata.get("model", metadata.get("model_name")),
        "l0": metadata.get("l0"),
        "tokens": metadata.get("n_tokens"),
        "dead": metadata.get("num_dead_features"),
        "normalisation": config.get("normalize_activations") or "none",
        "dtype": config.get("dtype"),
    }


def _modern(config: Any) -> Any:
    """A config of SAELens before 6 in the words of 6: its metadata stood at the top level, its k a level lower."""
    if not isinstance(config, dict):
        return config
    modern = {"architecture": "standard", **config}
    if config.get("activation_fn", config.get("activation_fn_str")) == "topk":
        modern |= {"architecture": "topk", "k": _part(config, "activation_fn_kwargs").get("k")}
    if isinstance(config.get("normalize_activations"), bool):
        modern["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    old = {"model_name": config.get("model_name"), "hook_name": config.get("hook_name", config.get("hook_point"))}
    modern["metadata"] = {name: value for name, value in old.items() if value} | _part(config, "metadata")
    return modern


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within a config; empty if it is not there."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _checked(config: Any, folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    counts = check_counts(config, ("d_in", "d_sae"), path)
    found = config["architecture"]
    if found not in ARCHITECTURES:
        raise FormatError(
            f"{folder} holds an SAE of architecture {found!r}, this version reads {', '.join(ARCHITECTURES)}"
        )
    if found in TRANSCODERS:
        check_counts(config, ("d_out",), path)
    if config.get("reshape_activations", "none") != "none":
        raise FormatError(f"{folder} reads attention heads ({config['reshape_activations']}), not the residual stream")
    if found == "topk":
        check_k(config.get("k"), counts["d_sae"], path)
    return config


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of older versions under today's names; a scaling factor that is 1 throughout scales nothing."""
    tensors = dict(tensors)
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").double().exp()
    if "scaling_factor" in tensors and (tensors["scaling_factor"] == 1).all():
        del tensors["scaling_factor"]
    return tensors


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    architecture, d_in, n_latents = config["architecture"], config["d_in"], config["d_sae"]
    d_out = config["d_out"] if architecture in TRANSCODERS else d_in
    shapes = {"W_enc": (d_in, n_latents), "W_dec": (n_latents, d_out), "b_enc": (n_latents,), "b_dec": (d_out,)}
    if architecture == "gated":
        del shapes["b_enc"]
        shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), (n_latents,))
    if "jumprelu" in architecture:
        shapes["threshold"] = (n_latents,)
    if architecture in BATCH_TOPK:
        shapes["topk_threshold"] = ()
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, d_in)
    return shapes


def _folded(raw: RawSAE, config: dict[str, Any], folder: Path) -> RawSAE:
    """With its input normalisation in the weights: first undone what came last, the whitening, then the scale."""
    kind = config.get("normalize_activations") or "none"
    if kind == "none":
        return raw
    if kind not in ("expected_average_only_in", "covariance_whitening"):
        raise FormatError(
            f"{folder} has normalize_activations {kind!r}, by each token's own statistics, which no weights can hold: "
            "use an SAE that was trained with none, expected_average_only_in or covariance_whitening"
        )
    if raw.transcodes:
        raise FormatError(f"{folder} is a transcoder with normalize_activations {kind!r}: only none is read")
    scaler = _scaler(folder, kind)
    if kind == "covariance_whitening":
        shapes = {"mean": (config["d_in"],), "matrix": (config["d_in"],) * 2, "inverse_matrix": (config["d_in"],) * 2}
        t = check_tensors(read_safetensors(folder / WHITENING), shapes, folder / WHITENING, "whitening")
        raw = raw.whitened(t["mean"], t["matrix"], t["inverse_matrix"])
    factor = scaler.get("scaling_factor")
    return raw if factor is None and kind == "covariance_whitening" else raw.scaled(_factor(factor, folder))


def _scaler(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / SCALER
    if not path.is_file():
        raise FormatError(
            f"{folder} has normalize_activations {kind!r} that is not folded into the weights: copy {SCALER} of its "
            f"checkpoint there, or write it: {{'scaling_factor': sqrt(d_in) / mean activation norm}}"
        )
    found = read_json(path, "activation scaler")
    return found if isinstance(found, dict) else {}


def _factor(factor: Any, folder: Path) -> float:
    if not isinstance(factor, int | float) or not math.isfinite(factor) or factor <= 0:
        raise FormatError(f"{folder / SCALER} must have a scaling_factor above 0, got {factor!r}")
    return float(factor)


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """The file's metadata, with our ``hook`` read off SAELens' name where only that is there."""
    metadata = dict(config["metadata"])
    name = str(metadata.get("hook_name"))
    if named := re.fullmatch(HOOK, name):
        metadata.setdefault("hook", f"layers.{named[1]}.{named[2]}")
    elif named := re.fullmatch(BLOCK, name):
        metadata.setdefault("hook", f"layers.{named[1]}.resid_post")
    return metadata
