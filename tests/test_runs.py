import json
import os
import subprocess

import pytest

from sae_persona.errors import FormatError, RunError
from sae_persona.runs import FORMAT, Run, file_hash, read_json, write_json, write_text, write_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "x.txt"
    write_text(path, "first")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_whole(path, fail)
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_a_folder_is_replaced_whole_if_it_bears_the_mark(tmp_path):
    def fill(text):
        def write(folder):
            folder.mkdir()
            (folder / "cfg.json").write_text(text)

        return write

    write_whole(tmp_path / "sae", fill("one"), mark="cfg.json")
    write_whole(tmp_path / "sae", fill("two"), mark="cfg.json")
    assert (tmp_path / "sae" / "cfg.json").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_reading_what_is_not_there_or_not_json(tmp_path):
    with pytest.raises(FormatError, match="no ranking at"):
        read_json(tmp_path / "x.json", "ranking")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(FormatError, match=r"x.json is not a ranking"):
        read_json(tmp_path / "x.json", "ranking")


def test_hashes_tell_contents_apart(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    assert file_hash(tmp_path / "a") == file_hash(tmp_path / "b") != file_hash(tmp_path / "c")


def test_stages_are_recorded_when_they_end_well(tmp_path):
    run = Run.create(tmp_path / "run")
    with run.recording("train", seed=3) as facts:
        facts["tokens"] = 7
    with pytest.raises(RuntimeError), run.recording("measure"):
        raise RuntimeError
    assert [entry["stage"] for entry in Run.open(run.path).manifest["stages"]] == ["train"]
    entry = run.stage("train")
    assert (entry["seed"], entry["tokens"]) == (3, 7)
    assert entry["seconds"] >= 0
    assert entry["versions"]["python"]
    with pytest.raises(RunError, match="has no measure stage yet: run `sae-persona measure`"):
        run.stage("measure")


def test_a_run_is_not_overwritten_unless_asked(tmp_path):
    run = Run.create(tmp_path / "run")
    write_text(run.metrics, "{}")
    for make in (lambda: Run.create(run.path), lambda: Run.making(run.path).__enter__()):
        with pytest.raises(RunError, match="is not empty: choose another --out, or pass --force"):
            make()
        assert run.metrics.exists()
    with Run.making(run.path, force=True) as made:
        assert not made.metrics.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_after_an_error_all_is_as_it_was(tmp_path):
    with pytest.raises(RunError, match="no luck"), Run.making(tmp_path / "run") as made:
        write_text(made.metrics, "half")
        raise RunError("no luck")
    assert not list(tmp_path.iterdir())
    write_text(Run.create(tmp_path / "run").metrics, "old")
    with pytest.raises(RunError, match="no luck"), Run.making(tmp_path / "run", force=True) as made:
        write_text(made.metrics, "half")
        raise RunError("no luck")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert Run.open(tmp_path / "run").metrics.read_text() == "old"


def test_force_replaces_nothing_but_runs(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="is not a run folder, so --force does not replace it"):
        Run.making(tmp_path, force=True).__enter__()
    assert (tmp_path / "thesis.tex").exists()


def test_a_run_of_another_version_is_refused(tmp_path):
    run = Run.create(tmp_path / "run")
    raw = json.loads((run.path / "manifest.json").read_text())
    write_json(run.path / "manifest.json", {**raw, "format": FORMAT + 1})
    with pytest.raises(FormatError, match=f"has run format {FORMAT + 1}, this version reads {FORMAT}"):
        Run.open(run.path)
    with pytest.raises(RunError, match="no run folder at"):
        Run.open(tmp_path / "none")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount refused: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(small_disk):
    write_text(small_disk / "x.txt", "old")
    with pytest.raises(RunError, match=r"cannot write .*x.txt: No space left on device. Free some space"):
        write_text(small_disk / "x.txt", "new" * 100_000)
    assert (small_disk / "x.txt").read_text() == "old"
    assert [p.name for p in small_disk.iterdir()] == ["x.txt"]


def test_nobodys_folder_is_lost(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    for mark in (None, "cfg.json"):
        with pytest.raises(RunError, match="is a folder with other things in it"):
            write_whole(folder, lambda temporary: temporary.write_text("theirs"), mark=mark)
    assert (folder / "precious.txt").read_text() == "mine"


def test_an_interrupt_brings_the_old_run_back(tmp_path):
    write_text(Run.create(tmp_path / "run").metrics, "old")
    with pytest.raises(KeyboardInterrupt), Run.making(tmp_path / "run", force=True):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert Run.open(tmp_path / "run").metrics.read_text() == "old"


def test_names_with_slashes_stay_in_their_folder(tmp_path):
    run = Run.create(tmp_path / "run")
    assert run.ranking("happy/sad").parent == run.path / "rankings"
    assert run.sweep("../up").parent == run.path / "sweeps"
