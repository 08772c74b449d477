"""The README's first session and its Python run as they stand, and what it says of the commands is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sae_persona.lab.card import Card

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def first_word(line):
    """Of a printed line, without its numbers; empty where there is none."""
    return next(iter(re.sub(r"[\d.,+\-\[\]()%]+", "", line).split()), "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the session is run; `sae-persona` on its PATH is this package."""
    folder = tmp_path_factory.mktemp("readme")
    command = folder / "bin" / "sae-persona"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sae_persona "$@"\n')
    command.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def session(folder):
    (script,) = blocks("bash")
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    return environment, subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_first_session_runs(session, folder):
    _, done = session
    assert done.returncode == 0, done.stderr[-2000:]
    assert "logistic probe" in done.stdout
    assert (folder / "formal.json").is_file()
    assert (folder / "runs" / "first" / "report.html").stat().st_size > 50_000


@pytest.mark.slow
def test_the_session_shows_the_same_kinds_of_lines(session):
    """Numbers differ between machines; the words around them do not."""
    _, done = session
    (shown,) = blocks("text")
    printed = {word for line in done.stdout.splitlines() if (word := first_word(line))}
    for line in shown.splitlines():
        if (word := first_word(line)) and "..." not in line:
            assert word in printed, line


@pytest.mark.slow
def test_the_python_runs(session, folder):
    environment, _ = session
    (script,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith(".")


def test_every_command_is_listed():
    listed = set(re.findall(r"^\| `(\w+)", README, flags=re.MULTILINE))
    assert {"demo", "lab", "train", "measure", "rank", "show", "try", "sweep", "export", "report"} <= listed


def test_the_labs_numbers_are_its_cards():
    card = Card.load()
    row = re.compile(r"^\| (\w+) \| (\S+) → (\S+) \| (\S+) → (\S+) \|$", flags=re.MULTILINE)
    told = {m[1]: tuple(map(float, m.groups()[1:])) for m in row.finditer(README)}
    assert set(told) == set(card.inferred["assistant"])
    for trait, numbers in told.items():
        arms = [card.inferred[role][trait][arm] for role in ("assistant", "character") for arm in ("without", "with")]
        assert numbers == pytest.approx(arms, abs=0.0051), trait
