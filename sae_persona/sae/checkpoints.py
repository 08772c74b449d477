"""Checkpoints: all that training needs to go on to the bit, in one folder that is written whole or not at all.

    FOLDER/step-000001200/rank-0-of-1/checkpoint.json      format, facts of the run, numbers of each part
    FOLDER/step-000001200/rank-0-of-1/PART.safetensors     tensors of each part: the feed, and each SAE in training

Each of several ranks writes its own. It counts when all are there. A new one is in place before the old one goes, so a
full disk or a kill at any moment leaves a good one.
"""

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_persona.errors import FormatError, RunError
from sae_persona.runs import read_json, write_whole
from sae_persona.sae.shard import ALONE, Shard
from sae_persona.types import State

FORMAT = 1
RECORD = "checkpoint.json"


class Interrupted(RunError):
    """A signal ended training; its checkpoint is written. ``signal`` is the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class Checkpoints:
    """The checkpoints of one training run.

    folder    holds them; the last one is kept
    minutes   between two of them; 0: after every step
    facts     JSON values that must be the same where training goes on: configs, hashes of model and texts
    shard     this rank, where several train together
    """

    def __init__(self, folder: Path, *, minutes: float, facts: Mapping[str, Any], shard: Shard = ALONE) -> None:
        self.folder, self.minutes, self.shard = folder, minutes, shard
        self.facts = json.loads(json.dumps(facts))  # as a file gives them back
        self._written = time.monotonic()

    @property
    def due(self) -> bool:
        """It is time to write one."""
        return time.monotonic() - self._written >= 60 * self.minutes

    def save(self, step: int, parts: Mapping[str, State]) -> Path:
        """Write one, then remove those before it. RunError if the disk refuses: the one before stays."""
        whole = self.folder / f"step-{step:09}"
        path = whole / f"rank-{self.shard.rank}-of-{self.shard.world}"
        record = {
            "format": FORMAT,
            "step": step,
            "facts": self.facts,
            "parts": {name: dict(state.numbers) for name, state in parts.items()},
        }

        def write(temporary: Path) -> None:
            temporary.mkdir()
            for name, state in parts.items():
                save_file(_apart(state.tensors), _tensors(temporary, name))
            (temporary / RECORD).write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")

        try:
            write_whole(path, write, mark=RECORD)
        except RunError:
            if whole.is_dir() and not any(whole.iterdir()):
                whole.rmdir()
            raise
        if self.shard.total(1) == self.shard.world and self.shard.rank == 0:  # when all have written theirs
            for old in self.folder.glob("step-*"):
                if old != whole:
                    shutil.rmtree(old)
        self._written = time.monotonic()
        return whole

    def latest(self) -> list[dict[str, State]] | None:
        """The parts of the last one, of each rank that there was; None if there is none.

        FormatError: of another version, or broken. RunError: made with other facts, which the message names.
        """
        complete = [ranks for whole in sorted(self.folder.glob("step-*")) if (ranks := _ranks(whole))]
        return [self._read(path) for path in complete[-1]] if complete else None

    def _read(self, path: Path) -> dict[str, State]:
        record = read_json(path / RECORD, "checkpoint")
        if not isinstance(record, dict) or not {"format", "facts", "parts"} <= record.keys():
            raise FormatError(f"{path / RECORD} is not a checkpoint's record: start the run again")
        if record["format"] != FORMAT:
            raise FormatError(
                f"{path} has checkpoint format {record['format']}, this version reads {FORMAT}: start the run again"
            )
        if changed := _differences(record["facts"], self.facts):
            raise RunError(
                f"{path} was made with other settings: {'; '.join(changed)}. Give the old ones, or start again"
            )
        try:
            return {name: State(load_file(_tensors(path, name)), n) for name, n in record["parts"].items()}
        except (OSError, SafetensorError) as error:
            raise FormatError(f"{path} is broken: {error}") from error

    def clear(self) -> None:
        """Remove them all: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Signals:
    """Which signal has come, if any."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:  # asked twice: at once
            raise KeyboardInterrupt
        self.received = number


@contextmanager
def signals_held() -> Iterator[Signals]:
    """Within the block SIGINT and SIGTERM are only noted, so that a step and its checkpoint are finished first."""
    held = Signals()
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield held
        return
    before = {number: signal.signal(number, held) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which none shares memory with another, as safetensors wants them."""
    found, seen = {}, set()
    for name, x in tensors.items():
        x = x.detach().contiguous()
        place = x.untyped_storage().data_ptr()
        found[name] = x.clone() if place in seen else x
        seen.add(place)
    return found


def _ranks(whole: Path) -> list[Path]:
    """The folders of all ranks that wrote a checkpoint; none if not all have."""
    found = [path for path in whole.glob("rank-*-of-*") if (path / RECORD).is_file()]
    by_world: dict[int, list[Path]] = {}
    for path in found:
        by_world.setdefault(int(path.name.split("-")[3]), []).append(path)
    for world, paths in by_world.items():
        if len(paths) == world:
            return sorted(paths, key=lambda path: int(path.name.split("-")[1]))
    return []


def _tensors(folder: Path, part: str) -> Path:
    return folder / f"{part}.safetensors"


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, a sentence each."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{where}.{key}".strip("."))]
    return [] if old == new else [f"{where} was {old}, now {new}"]
