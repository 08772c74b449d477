"""What a run is searched by, made of what it holds, and made again when that has changed.

    RUN/search.sqlite            words: of scan.h5 (else latents.h5), descriptions.jsonl and the model's tokenizer
    RUN/directions.safetensors   directions: of the SAE's weights

Whether an input has changed is told by its size and time, and where these differ by its hash.
"""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from sae_persona.activations.lm import load_tokenizer
from sae_persona.errors import DataError, FormatError
from sae_persona.features.contexts import TopContexts
from sae_persona.features.descriptions import Descriptions
from sae_persona.features.dictionary import Dictionary, write_dictionary
from sae_persona.features.directions import Directions, directions_facts
from sae_persona.features.files import reading_h5
from sae_persona.features.readable import readable
from sae_persona.features.scan import findings_file
from sae_persona.features.stats import LatentStats
from sae_persona.runs import Run, file_hash
from sae_persona.sae.formats import WEIGHTS, sae_facts

Say = Callable[[str], None]


def open_dictionary(run: Run, say: Say) -> Dictionary:
    """The run's feature dictionary, made first if there is none or its inputs have changed; ``say`` hears of that.

    RunError if the run is not measured, DataError if its statistics are not of its SAE or its descriptions name a
    latent that does not exist, FormatError for a file that cannot be read.
    """
    path, kind = findings_file(run)
    _check_same(run, path, kind)
    inputs: dict[str, Path] = {"latents": path, "descriptions": run.descriptions}
    model = {name: run.stage("train")["model"][name] for name in ("name", "config_hash")}

    def known() -> dict[str, Any]:
        with closing(Dictionary.open(run.search)) as old:
            return old.facts.get("inputs", {})

    if reason := _why_stale(run.search, known, inputs, {"model": model}):
        say(f"making {run.search}: {reason}")
        stamps = {name: _stamp(path) for name, path in inputs.items()}  # before they are read
        with reading_h5(path, kind) as file:
            stats, contexts = LatentStats.from_h5(file["stats"]), TopContexts.from_h5(file["contexts"])
        descriptions = Descriptions.load(run) if run.descriptions.is_file() else {}
        if unknown := [latent for latent in descriptions if not 0 <= latent < stats.n_latents]:
            raise DataError(f"{run.descriptions} describes latent {unknown[0]}, there are {stats.n_latents}")
        texts = readable(contexts, load_tokenizer(model["name"]))
        write_dictionary(run.search, stats, texts, descriptions, {**stamps, "model": model})
    return Dictionary.open(run.search)


def open_directions(run: Run, say: Say) -> Directions:
    """The run's decoder directions, ready to be searched; made and told of as `open_dictionary` does."""
    rows = decoder_rows(run)
    inputs = {"sae": run.sae / WEIGHTS}

    def known() -> dict[str, Any]:
        return json.loads(directions_facts(run.directions).get("inputs", "{}"))

    if reason := _why_stale(run.directions, known, inputs, {}):
        say(f"making {run.directions}: {reason}")
        stamps = {"sae": _stamp(run.sae / WEIGHTS)}
        Directions.of(rows).save(run.directions, {"inputs": json.dumps(stamps)})
    return Directions.open(run.directions, rows)


def decoder_rows(run: Run) -> Tensor:
    """The decoder directions of the run's SAE, mapped from its file: [n_latents, d_out] fp32.

    The SAE of a run is always written by this package, with all scaling folded into the weights.
    """
    path = run.sae / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("W_dec")
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read the SAE weights {path}: {error}") from error


def _check_same(run: Run, path: Path, kind: str) -> None:
    """DataError if statistics and SAE have not as many latents."""
    with reading_h5(path, kind) as file:
        measured = len(file["stats/fired"])
    if (n_latents := sae_facts(run.sae)["n_latents"]) != measured:
        raise DataError(f"{run.path} has an SAE of {n_latents} latents and statistics of {measured}: measure it again")


def _why_stale(
    path: Path, read: Callable[[], dict[str, Any]], inputs: dict[str, Path], others: dict[str, Any]
) -> str | None:
    """Why an index has to be made, or None. ``read`` tells what it was made of."""
    if not path.is_file():
        return "there is none yet"
    try:
        known = read()
    except FormatError:
        return "the old one cannot be read"
    changed = [name for name, value in others.items() if known.get(name) != value]
    changed += [name for name, file in inputs.items() if not _is_same(file, known.get(name))]
    return f"{' and '.join(changed)} changed" if changed else None


def _is_same(path: Path, known: dict[str, Any] | None) -> bool:
    if known is None or not path.is_file():
        return known is None and not path.is_file()
    found = path.stat()
    if found.st_size != known.get("size"):
        return False
    return found.st_mtime_ns == known.get("mtime_ns") or file_hash(path) == known.get("sha256")


def _stamp(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": file_hash(path)}
