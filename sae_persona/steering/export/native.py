"""The native intervention file: ``NAME.json`` and ``NAME.safetensors`` beside it.

The JSON says which operation at which hook point, in which unit, at which tokens, what becomes of the error term, which
model and SAE it was made for, and what evidence it rests on. The tensors are what applying it needs: with a local
sparsity rule only the rows of the edited latents (``w_enc [m, d_in]``, ``b_enc [m]``, ``w_dec [m, d_in]``,
``threshold [m]``), so neither the SAE nor the corpus travels; TopK must encode all latents, so its file has no tensors
and asks for the SAE.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, FormatError, ModelError
from sae_persona.runs import file_hash, read_json, versions, write_json, write_whole
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Threshold, TopK
from sae_persona.steering.apply import intervene
from sae_persona.steering.interventions import OPERATIONS, LatentEdit, placed
from sae_persona.steering.positions import Positions
from sae_persona.steering.rows import Rows
from sae_persona.types import HookPoint

FORMAT = 1
KIND = "sae_persona intervention"
UNIT = "99.9th percentile of the latent's non-zero activations"


@dataclass(frozen=True, eq=False)
class Intervention:
    """Edits that are ready to be applied to the model they were made for."""

    lm: LM
    sae: SAE
    """The whole SAE, or the rows of the edited latents only."""
    edits: tuple[LatentEdit, ...]
    """Their latents count the rows of ``sae``."""
    latents: tuple[int, ...]
    """The latents' numbers in the SAE that they come from."""
    hook: HookPoint
    positions: Positions
    evidence: dict[str, Any]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, the model runs with the edits."""
        with intervene(self.lm, self.sae, self.edits, hook=self.hook, positions=self.positions):
            yield


def export(
    path: str | Path,
    lm: LM,
    sae: SAE,
    edits: tuple[LatentEdit, ...] | list[LatentEdit],
    *,
    positions: Positions = "answer",
    evidence: dict[str, Any] | None = None,
) -> Path:
    """Write ``path`` (ending in .json) and the .safetensors beside it, each whole or not at all; returns the former.

    ConfigError without edits, for edits that cannot be or a path of another ending; ModelError for another width.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ConfigError(f"an intervention file ends in .json, got {path.name}")
    if not edits:
        raise ConfigError("an intervention needs at least one edit, got none")
    sae.check_width(lm.d_model)
    lm.check(sae.hook)
    Rows.of(placed(edits, hook=None, positions=positions), sae, lm.d_model)  # refuses what cannot be applied
    tensors = _rows(sae, [edit.latent for edit in edits])
    tensor_path = path.with_suffix(".safetensors")
    if tensors:
        write_whole(tensor_path, lambda temporary: save_file(tensors, temporary))
    write_json(
        path,
        {
            "format": FORMAT,
            "kind": KIND,
            "hook": str(sae.hook),
            "layer_base": 0,
            "positions": positions,
            "error_term": "kept",
            "unit": UNIT,
            "edits": [_edit_to_json(edit) for edit in edits],
            "encoder": "partial" if tensors else "full",
            "model": {
                "name": lm.name,
                "config_hash": lm.config_hash,
                "d_model": lm.d_model,
                "n_layers": lm.n_layers,
            },
            "sae": {"fingerprint": sae.fingerprint, "n_latents": sae.n_latents, "rule": type(sae.rule).__name__},
            "tensors": {"file": tensor_path.name, "sha256": file_hash(tensor_path)} if tensors else None,
            "evidence": evidence or {},
            "versions": versions(),
        },
    )
    return path


def load_intervention(path: str | Path, lm: LM, sae: SAE | None = None) -> Intervention:
    """Read an intervention for ``lm``.

    sae   the SAE that it was made with: needed for a TopK SAE, and checked whenever it is given

    FormatError if a file is missing, corrupt or of another version; ModelError for another model or another SAE.
    """
    path = Path(path)
    raw = read_json(path, "intervention file")
    if not isinstance(raw, dict) or raw.get("kind") != KIND or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else None
        raise FormatError(f"{path} is not an intervention of format {FORMAT} (found {found}): export it again")
    try:
        edits = [_edit_from_json(edit) for edit in raw["edits"]]
        hook, positions, model, made_with = HookPoint.parse(raw["hook"]), raw["positions"], raw["model"], raw["sae"]
        evidence, partial = raw["evidence"], raw["encoder"] == "partial"
        _check_origin(path, lm, sae, model, made_with)
        part = _load_rows(path, raw["tensors"], hook, lm.device) if partial and sae is None else sae
    except (KeyError, TypeError) as error:
        raise FormatError(f"{path} is not a whole intervention ({error}): export it again") from error
    if part is None:
        raise ModelError(
            f"{path} edits a {made_with['rule']} SAE, whose latents depend on each other: pass the SAE too"
        )
    latents = tuple(edit.latent for edit in edits)
    if sae is None:
        edits = [replace(edit, latent=row) for row, edit in enumerate(edits)]
    return Intervention(lm, part, tuple(edits), latents, hook, positions, evidence)


def _rows(sae: SAE, latents: list[int]) -> dict[str, torch.Tensor]:
    """The rows that a local rule needs; nothing for TopK."""
    rule = sae.rule
    if isinstance(rule, TopK):
        return {}
    weights = {"w_enc": sae.w_enc, "b_enc": sae.b_enc, "w_dec": sae.w_dec}
    if isinstance(rule, Threshold):
        weights["threshold"] = rule.threshold  # pyright: ignore[reportArgumentType]
    return {name: weight.detach()[latents].contiguous().cpu() for name, weight in weights.items()}


def _load_rows(path: Path, named: dict[str, str], hook: HookPoint, device: torch.device) -> SAE:
    file = path.with_name(named["file"])
    if not file.is_file():
        raise FormatError(f"{path} needs {file.name} beside it, which is missing")
    if file_hash(file) != named["sha256"]:
        raise FormatError(f"{file} is not the file that {path.name} was written with: copy both again")
    try:
        rows = load_file(file)
    except SafetensorError as error:
        raise FormatError(f"{file} is not a safetensors file: {error}") from error
    rule = Threshold(rows["threshold"]) if "threshold" in rows else ReLU()
    b_dec = torch.zeros(rows["w_dec"].shape[1])  # not read: an edit never decodes
    return SAE(rows["w_enc"], rows["b_enc"], rows["w_dec"], b_dec, rule, {"hook": str(hook)}).to(device)


def _check_origin(path: Path, lm: LM, sae: SAE | None, model: dict[str, Any], made_with: dict[str, Any]) -> None:
    if model["config_hash"] != lm.config_hash:
        raise ModelError(f"{path} was made for {model['name']}, {lm.name} has another config: load the model it names")
    if sae is not None and made_with["fingerprint"] != sae.fingerprint:
        raise ModelError(f"{path} was made with another SAE: pass the one of its run, or none")


def _edit_to_json(edit: LatentEdit) -> dict[str, Any]:
    name = next(name for name, kind in OPERATIONS.items() if isinstance(edit, kind))
    return {"operation": name, **asdict(edit)}


def _edit_from_json(raw: dict[str, Any]) -> LatentEdit:
    fields = dict(raw)
    operation = fields.pop("operation")
    if operation not in OPERATIONS:
        raise FormatError(f"an edit's operation is one of {', '.join(OPERATIONS)}, got {operation!r}")
    return OPERATIONS[operation](**fields)
