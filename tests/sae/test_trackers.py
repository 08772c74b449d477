"""Adapters to experiment trackers, on fakes of their packages, and on the real ones where they are installed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from sae_persona.errors import ConfigError, RunError
from sae_persona.sae.trackers import open_trackers

LINE = {"step": 10, "tokens": 640, "loss": 1.5, "l0": 4.0, "fvu": float("nan"), "note": "text"}
NAMES = ["wandb", "trackio", "tensorboard"]
MODULES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "torch.utils.tensorboard"}


class Fake:
    """Stands for a run or a writer, and for the package that makes it; remembers what was asked of it."""

    def __init__(self, fails=()):
        self.calls, self.fails = [], set(fails)

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name in self.fails:
                raise OSError(f"{name} is broken.\nSecond line.")
            return self

        return call

    def asked(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    made = {name: Fake() for name in NAMES}
    for name, fake in made.items():
        monkeypatch.setitem(sys.modules, MODULES[name], fake)
    return made


def opened(tmp_path, *names):
    return open_trackers(names, folder=tmp_path / "run", name="l12", config={"k": 4})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_lines_go_out_as_numbers_at_their_step(name, fakes, tmp_path):
    (tracker,) = opened(tmp_path, name)
    tracker.log(LINE)
    tracker.close()
    ((_, kwargs),) = fakes[name].asked("init")
    assert kwargs["name"] == "l12" and kwargs["config"] == {"k": 4} and kwargs["project"] == "sae_persona"
    assert fakes[name].asked("log") == [(({"tokens": 640, "loss": 1.5, "l0": 4.0},), {"step": 10})]
    assert fakes[name].asked("finish")


def test_tensorboard_has_a_curve_a_measure(fakes, tmp_path):
    (tracker,) = opened(tmp_path, "tensorboard")
    tracker.log(LINE)
    tracker.close()
    fake = fakes["tensorboard"]
    assert fake.asked("SummaryWriter") == [((), {"log_dir": str(tmp_path / "run" / "tensorboard")})]
    assert [args for args, _ in fake.asked("add_scalar")] == [("tokens", 640, 10), ("loss", 1.5, 10), ("l0", 4.0, 10)]
    assert '"k": 4' in fake.asked("add_text")[0][0][1] and fake.asked("close")


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "x"}, "online"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "x"}, "disabled"),
        ({"WANDB_MODE": "online"}, "online"),
    ],
    ids=str,
)
def test_wandb_sends_nothing_unless_the_user_has_set_it_up(environment, mode, fakes, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    opened(tmp_path, "wandb")
    ((_, kwargs),) = fakes["wandb"].asked("init")
    assert kwargs["mode"] == mode and kwargs["dir"] == str(tmp_path / "run") and (tmp_path / "run").is_dir()


@pytest.mark.parametrize("name", NAMES)
def test_a_package_that_is_absent_is_asked_for_before_anything_begins(name, fakes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    others = [other for other in NAMES if other != name]
    with pytest.raises(ConfigError, match=f"^--log {name} needs the package {name}: pip install {name}$"):
        opened(tmp_path, *others, name)
    assert not any(fakes[other].calls for other in others)


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--log is one of wandb, trackio, tensorboard, got 'mlflow'"):
        opened(tmp_path, "mlflow")


def test_none_asked_for_none_opened_and_none_twice(fakes, tmp_path):
    assert opened(tmp_path) == [] and not (tmp_path / "run").exists()
    assert len(opened(tmp_path, "trackio", "trackio")) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(name, fakes, tmp_path, capsys):
    (tracker,) = opened(tmp_path, name)
    fakes[name].fails = {"log", "add_scalar", "finish", "close"}
    for _ in range(3):
        tracker.log(LINE)
    tracker.close()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"{name} failed, training goes on: ")
    assert "is broken. metrics.jsonl has every line." in err
    fakes[name].fails, fakes[name].calls = set(), []
    tracker.log(LINE)
    assert fakes[name].calls, "it may have come back"


def test_a_tracker_that_does_not_start_closes_those_before_it(fakes, tmp_path):
    fakes["wandb"].fails = {"init"}
    with pytest.raises(RunError, match="--log wandb does not start: init is broken. Leave it out"):
        opened(tmp_path, "trackio", "wandb")
    assert fakes["trackio"].asked("finish")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("default")  # wandb's own
def test_the_real_wandb_offline(tmp_path, monkeypatch, capfd):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tracker,) = opened(tmp_path, "wandb")
    tracker.log(LINE)
    tracker.close()
    out, err = capfd.readouterr()
    assert out == "" and "failed" not in err
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"loss" in kept.read_bytes()


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_the_real_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = opened(tmp_path, "tensorboard")
    tracker.log(LINE)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (loss,) = events.Scalars("loss")
    assert (loss.step, loss.value) == (10, 1.5)
    assert (
        json.dumps({"k": 4}, indent=1) in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
@pytest.mark.filterwarnings("default")
def test_the_real_trackio(tmp_path):
    """In another process, since where it writes is decided as it is imported."""
    code = (
        "from pathlib import Path; from sae_persona.sae.trackers import open_trackers\n"
        f"(t,) = open_trackers(['trackio'], folder=Path({str(tmp_path)!r}), name='l12', config={{'k': 4}})\n"
        "t.log({'step': 10, 'loss': 1.5}); t.close()"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "kept"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
    assert any(b"loss" in path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file())
