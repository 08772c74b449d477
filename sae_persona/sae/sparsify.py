"""sparsify's layout, version 1.3: ``cfg.json`` and ``sae.safetensors``. Its words stay in this file.

    encoder.weight, encoder.bias, W_dec   [n_latents, d_in], [n_latents], [n_latents, d_in]
    b_dec, W_skip                         [d_in], and [d_in, d_in] with skip_connection
    num_latents                           0 means d_in * expansion_factor
    transcode                             predicts a module's output from its input, and then does not encode x - b_dec
    FOLDER/layers.10                      the folder's name is the module whose output it reads

Encode: the k largest of relu(w_enc (x - b_dec) + b_enc). The run's own ``config.json``, one folder up, names the model.
"""

import re
from pathlib import Path
from typing import Any

from sae_persona.errors import FormatError
from sae_persona.runs import read_json
from sae_persona.sae.files import check_counts, check_k, check_tensors, read_safetensors
from sae_persona.sae.folding import RawSAE
from sae_persona.sae.model import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
MORE_INPUTS = ("embed_skip", "gram_lookup")  # coders that read more than the activations


def wrote(config: Any) -> bool:
    """Whether a ``cfg.json`` is sparsify's: SAELens' has d_sae."""
    return (
        isinstance(config, dict) and "d_sae" not in config and bool({"expansion_factor", "num_latents"} & set(config))
    )


def read(config: dict[str, Any], folder: Path) -> SAE:
    """The SAE of a folder whose config was read.

    FormatError: another activation than topk, missing tensors, wrong shapes, NaN.
    """
    n_latents = _checked(config, folder)
    d_in, transcodes = config["d_in"], bool(config.get("transcode"))
    shapes = {
        "encoder.weight": (n_latents, d_in),
        "encoder.bias": (n_latents,),
        "W_dec": (n_latents, d_in),
        "b_dec": (d_in,),
    }
    if config.get("skip_connection"):
        shapes["W_skip"] = (d_in, d_in)
    t = check_tensors(read_safetensors(folder / WEIGHTS), shapes, folder / WEIGHTS, "sparsify")
    raw = RawSAE(
        t["encoder.weight"],
        t["encoder.bias"],
        t["W_dec"],
        t["b_dec"],
        k=config["k"],
        transcodes=transcodes,
        w_skip=t.get("W_skip"),
    )
    return (raw if transcodes else raw.centred()).finished(_metadata(config, folder))


def facts(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the config alone tells, in our words; None for what it does not say."""
    n_latents, metadata = _checked(config, folder), _metadata(config, folder)
    names = ["skip"] * bool(config.get("skip_connection")) + ["transcoder"] * bool(config.get("transcode"))
    return {
        "format": "sparsify",
        "architecture": " ".join(["topk", *names]),
        "d_in": config["d_in"],
        "d_out": config["d_in"],
        "n_latents": n_latents,
        "k": config["k"],
        "hook": metadata.get("hook", metadata["hookpoint"]),
        "model": metadata.get("model"),
        "l0": None,
        "tokens": None,
        "dead": None,
        "normalisation": "none",
        "dtype": None,
    }


def _checked(config: dict[str, Any], folder: Path) -> int:
    """The number of latents."""
    path = folder / CONFIG
    if config.get("activation", "topk") != "topk":
        raise FormatError(f"{folder} has activation {config['activation']!r}, of sparsify's only topk is read")
    if used := [name for name in MORE_INPUTS if config.get(name)]:
        raise FormatError(f"{folder} has {used[0]}: it reads more than the activations, which is not read here")
    counts = check_counts(config, ("d_in",), path)
    if config.get("num_latents"):
        n_latents = check_counts(config, ("num_latents",), path)["num_latents"]
    else:
        n_latents = counts["d_in"] * check_counts(config, ("expansion_factor",), path)["expansion_factor"]
    check_k(config.get("k"), n_latents, path)
    return n_latents


def _metadata(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The hook point that the folder's name tells, and the model of the run that it lies in."""
    name = folder.resolve().name
    metadata: dict[str, Any] = {"hookpoint": name}
    block = re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.(\d+)", name)
    if block and not config.get("transcode"):  # which reads what goes into the module
        metadata["hook"] = f"layers.{block[1]}.resid_post"
    above = folder.resolve().parent / "config.json"
    run = read_json(above, "sparsify config") if above.is_file() else {}
    if isinstance(run, dict) and isinstance(run.get("model"), str):
        metadata["model"] = run["model"]
    return metadata
