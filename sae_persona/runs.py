"""A run folder: the only thing that two processes share.

    RUN/manifest.json              format, versions, and one entry a stage: resolved config, inputs, seconds
    RUN/sae/                       cfg.json + sae_weights.safetensors (SAELens' layout)
    RUN/metrics.jsonl              one line a logged training step
    RUN/checkpoints/               while training: what it goes on from
    RUN/quality.json               FVU, L0, dead share, CE and KL on held-out texts
    RUN/latents.h5                 LatentStats and top contexts of the measured dialogues
    RUN/scan.h5                    the same of a corpus, with sampled contexts and co-firing: a Scan
    RUN/examples.h5                pooled latents and activations of each labelled example
    RUN/descriptions.jsonl         tokens, scores and explanations of latents, one a line
    RUN/explanations.jsonl         every prompt put to an explainer and its answer
    RUN/search.sqlite              latents by word, and RUN/directions.safetensors: made again when these change
    RUN/rankings/PERSONA.json      a Ranking
    RUN/rankings/given/COVARIATES/PERSONA.json   one given covariates
    RUN/screens/PERSONA.json       a Screen
    RUN/sweeps/NAME.json           a Sweep
    RUN/interventions/NAME.json    an Intervention, with NAME.safetensors beside it
    RUN/report.html

Every file is written whole or not at all: to a temporary name beside it, flushed to disk, then renamed.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote
from uuid import uuid4

from safetensors import SafetensorError

from sae_persona.errors import FormatError, RunError, SaePersonaError

FORMAT = 1
PACKAGES = ("sae-persona", "torch", "transformers", "triton", "numpy")


def versions() -> dict[str, str | None]:
    """Version of Python and of each package that results depend on; None where one is not installed."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_whole(path: Path, write: Callable[[Path], object], *, mark: str | None = None) -> None:
    """Let ``write`` fill a temporary file or folder beside ``path``, then put it in place: in one rename, but that a
    folder which is replaced is renamed away first.

    mark   for a folder: the file that tells that one is of this kind, and may be replaced

    A file that stood at ``path`` is replaced; a folder only if it is empty or bears ``mark``, so that nobody's files
    are lost. On any failure all is left as it was. RunError when the disk refuses or another folder is in the way.
    """
    if path.is_dir() and any(path.iterdir()) and not (mark and (path / mark).is_file()):
        raise RunError(f"{path} is a folder with other things in it: choose another name")
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        if path.is_dir():  # a folder cannot be renamed over a full one
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
        _flush_names(path.parent)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise RunError(f"cannot write {path}: {reason}. Free some space or choose another --out.") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def _flush_names(folder: Path) -> None:
    """The folder's entries, to the disk: a rename is lost with the power otherwise."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    for part in [path, *path.rglob("*")] if path.is_dir() else [path]:
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all. NaN is refused: write None for what is not known."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file. FormatError, with ``what`` it should have been, if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"no {what} at {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of numbers and nests without end
        raise FormatError(f"{path} is not a {what}: {error}") from error


@contextmanager
def whole(path: str | Path, what: str) -> Iterator[None]:
    """Inside, a part of a file that is missing, or of another kind, is a FormatError that says so."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, SaePersonaError):
            raise
        raise FormatError(f"{path} is not a whole {what} ({error!r}): make it again") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's files in name order, in hex."""
    digest = sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(part.name.encode())
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _taken(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


@dataclass(frozen=True)
class Run:
    """A run folder that exists, with a manifest of this version."""

    path: Path

    @classmethod
    def create(cls, path: str | Path) -> Self:
        """Make a new run folder. RunError if something is there already."""
        path = Path(path)
        if _taken(path):
            raise RunError(f"{path} is not empty: choose another --out, or pass --force to replace it")
        write_json(path / "manifest.json", {"format": FORMAT, "versions": versions(), "stages": []})
        return cls(path)

    @classmethod
    @contextmanager
    def making(cls, path: str | Path, *, force: bool = False, resume: bool = False) -> Iterator[Self]:
        """Make a run folder for what the block does. If the block ends in an error, the folder is gone again.

        force    replace a run that is there; it comes back after an error
        resume   go on with a run that is there, or make one

        A folder with a checkpoint, or with all that was trained, stays after an error: it can be resumed. RunError if
        something else is there.
        """
        path, old = Path(path), None
        if resume and _taken(path):
            yield cls.open(path)
            return
        if force and _taken(path):
            if not (path / "manifest.json").is_file():
                raise RunError(f"{path} is not a run folder, so --force does not replace it: choose another --out")
            old = path.rename(path.with_name(f".{path.name}.{uuid4().hex[:8]}.old"))
        made = None
        try:
            made = cls.create(path)
            yield made
        except BaseException:  # an interrupt too must bring the old run back
            if made and (any(made.checkpoints.glob("step-*")) or made.has("train")):
                if old:
                    shutil.rmtree(old)
                raise
            if made:
                shutil.rmtree(path)
            if old:
                old.rename(path)
            raise
        if old:
            shutil.rmtree(old)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run folder. RunError if there is none, FormatError if another version wrote it."""
        path = Path(path)
        if not path.is_dir():
            raise RunError(f"no run folder at {path}: `sae-persona train` makes one")
        manifest = read_json(path / "manifest.json", "run manifest")
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise FormatError(f"{path} has run format {found}, this version reads {FORMAT}: make the run again")
        if not isinstance(manifest.get("stages"), list):
            raise FormatError(f"{path / 'manifest.json'} has no list of stages: make the run again")
        return cls(path)

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json", "run manifest")

    def stage(self, name: str) -> dict[str, Any]:
        """The latest manifest entry of a stage. RunError if that stage has not been run."""
        entries = [entry for entry in self.manifest["stages"] if entry["stage"] == name]
        if not entries:
            raise RunError(f"{self.path} has no {name} stage yet: run `sae-persona {name}` on it first")
        return entries[-1]

    def has(self, name: str) -> bool:
        """Whether a stage has been run."""
        return any(entry["stage"] == name for entry in self.manifest["stages"])

    @contextmanager
    def recording(self, stage: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """Time a stage and, if it ends well, add its entry to the manifest. Facts may be added inside."""
        start = time.perf_counter()
        yield facts
        manifest = self.manifest
        seconds = round(time.perf_counter() - start, 3)
        manifest["stages"].append({"stage": stage, "seconds": seconds, "versions": versions(), **facts})
        write_json(self.path / "manifest.json", manifest)

    @property
    def sae(self) -> Path:
        return self.path / "sae"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def quality(self) -> Path:
        return self.path / "quality.json"

    @property
    def latents(self) -> Path:
        return self.path / "latents.h5"

    @property
    def scan(self) -> Path:
        return self.path / "scan.h5"

    @property
    def examples(self) -> Path:
        return self.path / "examples.h5"

    @property
    def descriptions(self) -> Path:
        return self.path / "descriptions.jsonl"

    @property
    def explanations(self) -> Path:
        return self.path / "explanations.jsonl"

    @property
    def search(self) -> Path:
        return self.path / "search.sqlite"

    @property
    def directions(self) -> Path:
        return self.path / "directions.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def ranking(self, persona: str, given: Sequence[str] = ()) -> Path:
        """The plain ranking, which other stages go on from, or the one given covariates, which lies beside it."""
        folder = self.path / "rankings"
        if given:
            folder /= Path("given", quote(",".join(given), safe=" ,="))
        return folder / f"{quote(persona, safe=' ')}.json"

    def screen(self, persona: str) -> Path:
        return self.path / "screens" / f"{quote(persona, safe=' ')}.json"

    def sweep(self, name: str) -> Path:
        return self.path / "sweeps" / f"{quote(name, safe=' ')}.json"

    def intervention(self, name: str) -> Path:
        return self.path / "interventions" / f"{quote(name, safe=' ')}.json"
