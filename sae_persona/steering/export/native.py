"""The native intervention file: ``NAME.json`` and, where it has tensors, ``NAME.safetensors`` beside it.

The JSON says of every edit which operation at which hook point, in which unit, at which tokens, under which condition
and with which priority; what becomes of the error term; which model and SAEs it was made for; and on what evidence.
The tensors are what applying it needs: directions, and of an SAE with a local rule only the rows of the latents that
are edited or waited for, so neither the SAE nor the corpus travels. TopK must encode all latents, so its file asks for
the SAE.

    HOOK.w_enc, HOOK.w_dec [m, d_in]   HOOK.b_enc, HOOK.threshold [m]   rows of the latents that saes.HOOK.latents lists
    edits.I.direction [d_in]           edits.I.directions [m, d_in]     conditions.I.direction [d_in]

Format 1, with one hook point and no directions or conditions, is read too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, FormatError, ModelError, SaePersonaError
from sae_persona.runs import file_hash, read_json, versions, write_json, write_whole
from sae_persona.sae.files import check_tensors, read_safetensors
from sae_persona.sae.model import SAE
from sae_persona.steering.apply import SAEs
from sae_persona.steering.conditions import When
from sae_persona.steering.export.intervention import Intervention, MadeFor, Part, needs_all, part_of_rows
from sae_persona.steering.interventions import DIRECTION_OPERATIONS, OPERATIONS, Edit, LatentEdit, Placed
from sae_persona.steering.positions import Positions, Spans, parse_positions
from sae_persona.steering.rows import check_collisions
from sae_persona.types import HookPoint

FORMAT = 2
KIND = "sae_persona intervention"
UNIT = "99.9th percentile of the latent's non-zero activations; directions in units of the residual stream"
ERROR_TERM = "kept"
DIRECTIONS = ("direction", "directions")
OPERATIONS_BY_NAME: dict[str, type[Edit]] = {**OPERATIONS, **DIRECTION_OPERATIONS}


def export(
    path: str | Path,
    lm: LM,
    sae: SAEs,
    edits: Sequence[Edit | Placed],
    *,
    hook: HookPoint | None = None,
    positions: Positions | Spans = "answer",
    evidence: Mapping[str, Any] | None = None,
) -> Path:
    """Write edits, as `intervene` takes them, to ``path`` and the .safetensors beside it; returns ``path``.

    Each file whole or not at all. ConfigError without edits, for edits that cannot be or a path that does not end in
    .json; ModelError for another width.
    """
    return write(Intervention.of(lm, sae, edits, hook=hook, positions=positions, evidence=evidence), path)


def write(intervention: Intervention, path: str | Path) -> Path:
    """Write an intervention, as `export`."""
    path = Path(path)
    if path.suffix != ".json":
        raise ConfigError(f"an intervention file ends in .json, got {path.name}")
    conditions = list({id(one.when): one.when for one in intervention.edits if one.when is not None}.values())
    saes, tensors = _saes_to_json(intervention)
    raw_edits = [_edit_to_json(one, i, conditions, tensors) for i, one in enumerate(intervention.edits)]
    raw_conditions = [_condition_to_json(when, i, tensors) for i, when in enumerate(conditions)]
    tensor_path = path.with_suffix(".safetensors")
    if tensors:
        write_whole(tensor_path, lambda temporary: save_file(tensors, temporary))
    write_json(
        path,
        {
            "format": FORMAT,
            "kind": KIND,
            "layer_base": 0,
            "error_term": ERROR_TERM,
            "unit": UNIT,
            "edits": raw_edits,
            "conditions": raw_conditions,
            "model": asdict(intervention.model),
            "saes": saes,
            "tensors": {"file": tensor_path.name, "sha256": file_hash(tensor_path)} if tensors else None,
            "approximation": intervention.approximation,
            "evidence": dict(intervention.evidence),
            "versions": versions(),
        },
    )
    return path


def load_intervention(path: str | Path, sae: SAEs = None) -> Intervention:
    """Read an intervention file.

    sae   the SAE that it was made with, or SAEs by hook point: needed for TopK, and checked whenever it is given

    FormatError if a file is missing, corrupt, of another version or says what cannot be; ModelError for another SAE.
    """
    path = Path(path)
    raw = read_json(path, "intervention file")
    found = raw.get("format") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or raw.get("kind") != KIND or found not in (1, FORMAT):
        raise FormatError(f"{path} is not an intervention of format 1 or {FORMAT} (found {found}): export it again")
    try:
        tensors = _read_tensors(path, raw["tensors"])
        if found == 1:
            raw, tensors = _of_format_1(raw, tensors)
        _check_conventions(path, raw)
        return _read(path, raw, tensors, sae)
    except ConfigError as error:
        raise FormatError(f"{path} says what cannot be: {error}") from error
    except SaePersonaError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, OSError) as error:
        reason = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else "a value in it is of another kind"
        raise FormatError(f"{path} is not a whole intervention ({reason}): export it again") from error


def _read(path: Path, raw: dict[str, Any], tensors: dict[str, Tensor], given: SAEs) -> Intervention:
    model = _model(raw["model"])
    _check_shapes(path, raw, tensors, model.d_model)
    parts = {HookPoint.parse(hook): _part(path, hook, said, tensors, given) for hook, said in raw["saes"].items()}
    conditions = [_condition_from_json(condition, tensors) for condition in raw["conditions"]]
    edits = tuple(_edit_from_json(edit, tensors, conditions) for edit in raw["edits"])
    if not edits:
        raise FormatError(f"{path} has no edits: export it again")
    for name in ("evidence", "approximation"):
        if not isinstance(raw.get(name), dict) and not (raw.get(name) is None and name == "approximation"):
            raise ConfigError(f"{name} is no JSON object")
    intervention = Intervention(
        edits=edits, parts=parts, model=model, evidence=raw["evidence"], approximation=raw.get("approximation")
    )
    _check_latents(path, intervention)
    for hook in intervention.hooks:
        latents = [(one.edit.latent, one, 0) for one in edits if one.hook == hook and isinstance(one.edit, LatentEdit)]
        check_collisions(latents)
    return intervention


def _model(raw: dict[str, Any]) -> MadeFor:
    made = MadeFor(**raw)
    kinds = {"name": str, "d_model": int, "n_layers": int, "config_hash": str, "blocks": str, "bos_id": int}
    for name, kind in kinds.items():
        value, may_lack = getattr(made, name), name not in ("name", "d_model")
        if not (value is None and may_lack) and (isinstance(value, bool) or not isinstance(value, kind)):
            raise ConfigError(f"model.{name} is not {'a whole number' if kind is int else 'a text'}")
    return made


def _saes_to_json(intervention: Intervention) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What each hook point's SAE is, and the rows of it that a local rule needs."""
    said, tensors = {}, {}
    for hook, part in intervention.parts.items():
        latents = {latent for at, latent in _latents(intervention.edits) if at == hook}
        facts = {"fingerprint": part.fingerprint, "n_latents": part.n_latents, "rule": part.rule}
        if needs_all(part):
            said[str(hook)] = {**facts, "encoder": "full", "latents": sorted(latents)}
            continue
        said[str(hook)] = {**facts, "encoder": "partial", "latents": sorted(latents)}
        tensors |= {f"{hook}.{name}": rows for name, rows in part.rows(sorted(latents)).items()}
    return said, tensors


def _latents(edits: Sequence[Placed]) -> list[tuple[HookPoint | None, int]]:
    """The latents that are edited or waited for, and where."""
    found = [(one.hook, one.edit.latent) for one in edits if isinstance(one.edit, LatentEdit)]
    whens = [one.when for one in edits if one.when is not None]
    return found + [(when.hook, when.latent) for when in whens if when.latent is not None]


def _edit_to_json(one: Placed, i: int, conditions: list[When], tensors: dict[str, Tensor]) -> dict[str, Any]:
    said: dict[str, Any] = {"operation": one.edit.name, "hook": str(one.hook)}
    for field in fields(one.edit):
        value = getattr(one.edit, field.name)
        if field.name in DIRECTIONS:
            tensors[name := f"edits.{i}.{field.name}"] = _stored(value)
            value = name
        said[field.name] = value
    said |= {"positions": str(one.positions), "priority": one.priority}
    said["when"] = None if one.when is None else [id(when) for when in conditions].index(id(one.when))
    return said


def _edit_from_json(raw: dict[str, Any], tensors: dict[str, Tensor], conditions: list[When]) -> Placed:
    kind = OPERATIONS_BY_NAME.get(raw["operation"])
    if kind is None:
        names = ", ".join(OPERATIONS_BY_NAME)
        raise ConfigError(f"an edit's operation is one of {names}, got {raw['operation']!r}")
    values = {}
    for field in fields(kind):
        value = raw[field.name]
        if field.name in DIRECTIONS:
            value = tensors[value]
        elif field.name != "keep":
            _check_number(field.name, value, whole=field.name == "latent")
        values[field.name] = value
    _check_number("priority", raw["priority"], whole=True)
    return Placed(
        edit=kind(**values),
        hook=HookPoint.parse(raw["hook"]),
        positions=parse_positions(raw["positions"]),
        when=None if raw["when"] is None else _condition(raw["when"], conditions),
        priority=raw["priority"],
    )


def _condition(number: Any, conditions: list[When]) -> When:
    _check_number("when", number, whole=True)
    if not 0 <= number < len(conditions):
        raise ConfigError(f"an edit waits for condition {number}, and there are {len(conditions)}")
    return conditions[number]


def _condition_to_json(when: When, i: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    said: dict[str, Any] = {"above": when.above, "latent": when.latent, "direction": None}
    if when.direction is not None:
        said["direction"] = f"conditions.{i}.direction"
        tensors[said["direction"]] = _stored(when.direction)
    return {**said, "scope": when.scope, "hook": str(when.hook)}


def _condition_from_json(raw: dict[str, Any], tensors: dict[str, Tensor]) -> When:
    _check_number("above", raw["above"])
    if raw["latent"] is not None:
        _check_number("a condition's latent", raw["latent"], whole=True)
    direction = None if raw["direction"] is None else tensors[raw["direction"]]
    values = {name: raw[name] for name in ("above", "latent", "scope")}
    return When(**values, direction=direction, hook=HookPoint.parse(raw["hook"]))


def _stored(x: Tensor) -> Tensor:
    return x.detach().float().cpu().contiguous().clone()


def _check_number(name: str, value: Any, *, whole: bool = False) -> None:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}")


def _check_conventions(path: Path, raw: dict[str, Any]) -> None:
    """FormatError where layers are counted or the error term is kept in another way than here."""
    if raw["layer_base"] != 0:
        raise FormatError(f"{path} counts layers from {raw['layer_base']}, this version reads 0: export it again")
    if raw["error_term"] != ERROR_TERM:
        raise FormatError(f"{path} wants the error term {raw['error_term']!r}, this version keeps it: export it again")


def _read_tensors(path: Path, named: dict[str, str] | None) -> dict[str, Tensor]:
    if named is None:
        return {}
    if Path(named["file"]).name != named["file"]:
        raise FormatError(f"{path} names tensors in another folder, and they belong beside it: copy both together")
    file = path.with_name(named["file"])
    if not file.is_file():
        raise FormatError(f"{path} needs {file.name} beside it, which is missing")
    if file_hash(file) != named["sha256"]:
        raise FormatError(f"{file} is not the file that {path.name} was written with: copy both again")
    found = read_safetensors(file)
    if odd := [name for name, x in found.items() if not x.is_floating_point()]:
        raise FormatError(f"{file}: {odd[0]} holds {found[odd[0]].dtype}, wanted floating point: export it again")
    return {name: x.float() for name, x in found.items()}


def _check_shapes(path: Path, raw: dict[str, Any], tensors: dict[str, Tensor], d: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for hook, said in raw["saes"].items():
        _check_sae(said)
        m = len(said["latents"])
        if said["encoder"] == "partial":
            shapes |= {f"{hook}.w_enc": (m, d), f"{hook}.b_enc": (m,), f"{hook}.w_dec": (m, d)}
            shapes |= {f"{hook}.threshold": (m,)} if said["rule"] == "Threshold" else {}
    for owner in (*raw["edits"], *raw["conditions"]):
        for key in DIRECTIONS:
            if owner.get(key) is not None:
                shapes[owner[key]] = (*tensors[owner[key]].shape[:-1], d)
    if shapes or tensors:
        check_tensors(tensors, shapes, path.with_suffix(".safetensors"), "what the edits need")


def _check_sae(said: dict[str, Any]) -> None:
    """ConfigError unless what is said of an SAE has the types that it is read with."""
    _check_number("n_latents", said["n_latents"], whole=True)
    for name in ("rule", "fingerprint", "encoder"):
        if not isinstance(said[name], str):
            raise ConfigError(f"an SAE's {name} is a text")
    if said["encoder"] not in ("full", "partial"):
        raise ConfigError(f"an encoder is full or partial, got {said['encoder']!r}")
    for latent in said["latents"]:
        _check_number("a latent", latent, whole=True)


def _part(path: Path, hook: str, said: dict[str, Any], tensors: dict[str, Tensor], given: SAEs) -> Part:
    point = HookPoint.parse(hook)
    whole = given if isinstance(given, SAE) else (given or {}).get(point)
    facts = {name: said[name] for name in ("rule", "n_latents", "fingerprint")}
    if whole is not None:
        if said["fingerprint"] != whole.fingerprint:
            raise ModelError(f"{path} was made with another SAE: pass the one of its run, or none")
        return Part(**facts, sae=whole)
    if said["encoder"] == "full":
        return Part(**facts, sae=None)
    rows = {name.removeprefix(f"{hook}."): x for name, x in tensors.items() if name.startswith(f"{hook}.")}
    return Part(**facts, sae=part_of_rows(rows, point), latents=tuple(said["latents"]))


def _check_latents(path: Path, intervention: Intervention) -> None:
    for hook, latent in _latents(intervention.edits):
        part = intervention.parts.get(hook) if hook is not None else None
        if part is None:
            raise FormatError(f"{path} edits latent {latent} at {hook}, and tells of no SAE there: export it again")
        if not 0 <= latent < part.n_latents:
            raise FormatError(f"{path} edits latent {latent}, its SAE has latents 0 to {part.n_latents - 1}")
        if part.latents is not None and latent not in part.latents:
            raise FormatError(f"{path} edits latent {latent}, whose rows it does not have: export it again")


def _of_format_1(raw: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file of one hook point, whose rows were in the order of its edits, in the words of format 2."""
    hook = raw["hook"]
    place = {"hook": hook, "positions": raw["positions"], "priority": 0, "when": None}
    edits = [{**edit, **place} for edit in raw["edits"]]
    sae = {**raw["sae"], "encoder": raw["encoder"], "latents": [edit["latent"] for edit in edits]}
    newer = {**raw, "edits": edits, "conditions": [], "saes": {hook: sae}}
    return newer, {f"{hook}.{name}": rows for name, rows in tensors.items()}
