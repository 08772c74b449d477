"""Training metrics in an experiment tracker, beside metrics.jsonl: Weights & Biases, Trackio or TensorBoard.

None of them is a dependency: a tracker's package is imported when a run asks for it, before training starts.

wandb        RUN/wandb, offline, so that nothing leaves the machine, unless WANDB_API_KEY or WANDB_MODE says otherwise;
             `wandb sync` sends it later
trackio      on this machine, where TRACKIO_DIR says, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another
tensorboard  RUN/tensorboard
"""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from sae_persona.errors import ConfigError, RunError

TrackerName = Literal["wandb", "trackio", "tensorboard"]
PROJECT = "sae_persona"


class Tracker(Protocol):
    """Takes the lines of metrics that training tells of, each with its step and tokens."""

    def log(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """Write what is left. Nothing is logged afterwards."""
        ...


def open_trackers(names: Sequence[str], *, folder: Path, name: str, config: dict[str, Any]) -> list[Tracker]:
    """Trackers of a run called ``name`` with that ``config``, which write into ``folder`` where they write files.

    A tracker that fails later on does not end the run: the first time, a line on stderr says so.

    ConfigError: an unknown tracker, or its package is not installed. RunError: it refuses to start.
    """
    packages = [(each, _package(each)) for each in dict.fromkeys(names)]  # all before any has begun
    opened: list[Tracker] = []
    for each, package in packages:
        try:
            opened.append(_Guarded(each, _OPEN[each][1](package, folder, name, config)))
        except Exception as error:
            for tracker in opened:
                tracker.close()
            raise RunError(f"--log {each} does not start: {_first_line(error)}. Leave it out or mend it.") from error
    return opened


def check_tracker(name: str) -> None:
    """ConfigError unless the tracker is known and its package is installed."""
    _package(name)


def _package(name: str) -> Any:
    if name not in _OPEN:
        raise ConfigError(f"--log is one of {', '.join(_OPEN)}, got {name!r}")
    try:
        return import_module(_OPEN[name][0])
    except ImportError as error:
        raise ConfigError(f"--log {name} needs the package {name}: pip install {name}") from error


class _Guarded:
    """A tracker whose failures are told once and kept from the run. Each line is tried: networks come back."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.failed = False

    def log(self, line: dict[str, Any]) -> None:
        self._attempt(lambda: self.tracker.log(line))

    def close(self) -> None:
        self._attempt(self.tracker.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - hours of training are worth more than their log
            if not self.failed:
                self.failed = True
                said = f"{self.name} failed, training goes on: {_first_line(error)}. metrics.jsonl has every line."
                tqdm.write(said, file=sys.stderr)


class _Wandb:
    def __init__(self, wandb: Any, folder: Path, name: str, config: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)  # else it writes to the temporary folder
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        quiet = {"silent": True, "console": "off"}  # stdout is for results
        self.run = wandb.init(project=PROJECT, name=name, dir=str(folder), config=config, mode=mode, settings=quiet)

    def log(self, line: dict[str, Any]) -> None:
        self.run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, trackio: Any, folder: Path, name: str, config: dict[str, Any]) -> None:
        self.run = trackio.init(project=PROJECT, name=name, config=config)

    def log(self, line: dict[str, Any]) -> None:
        self.run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        self.run.finish()


class _TensorBoard:
    def __init__(self, tensorboard: Any, folder: Path, name: str, config: dict[str, Any]) -> None:
        self.writer = tensorboard.SummaryWriter(log_dir=str(folder / "tensorboard"))
        self.writer.add_text("config", f"```\n{name}\n{json.dumps(config, indent=1)}\n```")

    def log(self, line: dict[str, Any]) -> None:
        for name, value in _numbers(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


_OPEN: dict[str, tuple[str, Callable[[Any, Path, str, dict[str, Any]], Tracker]]] = {
    "wandb": ("wandb", _Wandb),
    "trackio": ("trackio", _Trackio),
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
}
"""Module and adapter of each tracker."""


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """What can be drawn: finite numbers, but for the step, which is the place of them all."""
    return {
        name: value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
