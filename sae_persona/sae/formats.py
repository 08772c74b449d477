"""SAEs on disk, in SAELens' layout: ``cfg.json`` and ``sae_weights.safetensors``.

Ours load there and theirs load here, by json and safetensors alone. Their words stay in this file:

    W_enc [d_in, n_latents]    W_dec [n_latents, d_in]    b_enc, b_dec    threshold (jumprelu)
    architecture               standard = ReLU, topk = TopK, jumprelu = Threshold
    apply_b_dec_to_input       they encode x - b_dec; here that is folded into b_enc
    rescale_acts_by_decoder_norm    their activations times the norms of the decoder rows, which have not norm 1
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.errors import FormatError
from sae_persona.runs import read_json, write_whole
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Rule, Threshold, TopK
from sae_persona.types import HookPoint

SAELENS_VERSION = "6.54.12"  # whose layout this is; without a version SAELens drops the metadata at load
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = {ReLU: "standard", TopK: "topk", Threshold: "jumprelu"}


def hook_metadata(lm: LM, hook: HookPoint) -> dict[str, str]:
    """What says where an SAE belongs: our ``model`` and ``hook``, and the keys that SAELens and its users read."""
    names = {"model": lm.name, "hook": str(hook), "model_name": lm.name}
    names["hook_name"] = f"blocks.{hook.layer}.hook_{hook.site}"
    below = hook.layer if hook.site == "resid_post" else hook.layer - 1
    if below >= 0:  # what enters the first block is no block's output
        names["hf_hook_name"] = f"{lm.blocks_path}.{below}"
    return names


def save_sae(sae: SAE, folder: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
    """Write ``sae`` as a folder, whole or not at all; ``metadata`` joins its own. RunError if the disk refuses."""
    tensors = {"W_enc": sae.w_enc.T, "W_dec": sae.w_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    config = {
        "architecture": ARCHITECTURES[type(sae.rule)],
        "d_in": sae.d_in,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, **sae.metadata, **(metadata or {})},
    }
    if isinstance(sae.rule, TopK):
        config |= {"k": sae.rule.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(sae.rule, Threshold):
        tensors["threshold"] = sae.rule.threshold
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS)

    write_whole(Path(folder), write, mark=CONFIG)


def load_sae(folder: str | Path) -> SAE:
    """Read an SAE that we or SAELens wrote: standard, topk or jumprelu, in fp32 on the CPU.

    Decoder rows are brought to unit norm and the activations scaled up in turn, which leaves reconstructions as they
    were; so activations are SAELens' times ``W_dec.norm(dim=1)``. Only in a topk SAE that chose its k by unscaled
    pre-activations do rows keep their norms: there the scale decides who fires.

    Metadata keep SAELens' words; ``hook`` is added where ``hook_name`` tells it.

    FormatError: no such folder, not JSON, broken weights, another architecture, missing tensors, wrong shapes, an
    input normalisation that is not folded into the weights.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "SAE config")
    architecture = _checked_architecture(config, folder)
    t = _checked_tensors(config, architecture, folder)
    w_enc, w_dec, b_enc, b_dec = t["W_enc"].T, t["W_dec"], t["b_enc"], t["b_dec"]
    if config.get("apply_b_dec_to_input", True):  # their default
        b_enc = (b_enc.double() - w_enc.double() @ b_dec.double()).float()
    norms = w_dec.norm(dim=1).clamp(min=1e-8)
    if architecture == "topk" and not config.get("rescale_acts_by_decoder_norm", False):
        norms = torch.ones_like(norms)
    w_enc, w_dec, b_enc = w_enc * norms[:, None], w_dec / norms[:, None], b_enc * norms
    rule: Rule = ReLU()
    if architecture == "topk":
        rule = TopK(config["k"])
    elif architecture == "jumprelu":
        rule = Threshold(t["threshold"] * norms)
    return SAE(w_enc, b_enc, w_dec, b_dec, rule, _metadata(config))


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """The file's metadata, with our ``hook`` read off SAELens' name where only that is there."""
    metadata = dict(config.get("metadata") or {})
    named = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post)", str(metadata.get("hook_name")))
    if named:
        metadata.setdefault("hook", f"layers.{named[1]}.{named[2]}")
    return metadata


def _checked_architecture(config: Any, folder: Path) -> str:
    if not isinstance(config, dict) or not all(isinstance(config.get(key), int) for key in ("d_in", "d_sae")):
        raise FormatError(f"{folder / CONFIG} is not an SAE config: d_in and d_sae must be numbers")
    known, found = sorted(ARCHITECTURES.values()), config.get("architecture")
    if found not in known:
        raise FormatError(f"{folder} holds an SAE of architecture {found!r}, this version reads {', '.join(known)}")
    for key in ("normalize_activations", "reshape_activations"):
        if config.get(key, "none") != "none":
            raise FormatError(
                f"{folder} has {key} {config[key]!r}: fold it into the weights with SAELens and save again"
            )
    k = config.get("k")
    if found == "topk" and not (isinstance(k, int) and 1 <= k <= config["d_sae"]):
        raise FormatError(f"{folder / CONFIG}: a topk SAE needs k between 1 and {config['d_sae']}, got {k!r}")
    return found


def _checked_tensors(config: dict[str, Any], architecture: str, folder: Path) -> dict[str, Tensor]:
    d_in, n_latents = config["d_in"], config["d_sae"]
    shapes = {"W_enc": [d_in, n_latents], "W_dec": [n_latents, d_in], "b_enc": [n_latents], "b_dec": [d_in]}
    if architecture == "jumprelu":
        shapes["threshold"] = [n_latents]
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"cannot read the SAE weights {folder / WEIGHTS}: {error}") from error
    if set(tensors) != set(shapes):
        raise FormatError(
            f"{folder / WEIGHTS} must hold {', '.join(shapes)} ({architecture}), got {', '.join(tensors)}"
        )
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape:
            raise FormatError(
                f"{folder / WEIGHTS}: {name} must be {shape} by {CONFIG}, got {list(tensors[name].shape)}"
            )
        if not tensors[name].isfinite().all():
            raise FormatError(f"{folder / WEIGHTS}: {name} has NaN or infinite values")
    return {name: tensor.float() for name, tensor in tensors.items()}
