"""`export` and `apply` as a user meets them."""

import json
import shutil

import pytest

from sae_persona.lab import corpora
from sae_persona.runs import Run
from sae_persona.stages.pipeline import FarBeyond, edits_of
from sae_persona.steering.export.formats import FORMATS
from sae_persona.steering.export.native import load_intervention

ASK = ("lab", "what do you want ?", "--n", "2", "--max-new-tokens", "6")


@pytest.fixture
def run(demo_run, tmp_path):
    """A copy of the small run, to be changed at will."""
    return Run(shutil.copytree(demo_run.path, tmp_path / "run"))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in corpora.question_rows("formal", 6, "train")))
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_written_and_stands_in_the_manifest(call, run, tmp_path, name):
    path = tmp_path / f"x{FORMATS[name].suffix}"
    arguments = ["export", run.path, "--edit", "add:formal=1.5", "--positions", "every", "--format", name]
    code, out, err = call(*arguments, "--out", path)
    assert (code, out) == (0, f"{path}\n"), err
    assert all(file.exists() for file in FORMATS[name].files(path))
    assert run.stage("export")["form"] == name
    code, _, err = call(*arguments, "--out", path)
    assert code == 2 and "is there already: choose another --out, or pass --force to replace it" in err
    assert call(*arguments, "--out", path, "--force")[0] == 0


def test_a_clamp_as_a_control_vector_is_refused_or_approximated(call, run, questions, tmp_path):
    file = tmp_path / "formal.gguf"
    export = ["export", run.path, "--edit", "clamp:formal=2", "--format", "gguf", "--out", file]
    code, out, err = call(*export, "--positions", "every")
    (said,) = [line for line in err.splitlines() if line.startswith("sae-persona: ")]
    assert (code, out) == (2, "")
    assert "a control vector can only add" in said and "--approximate" in said
    code, _, err = call(*export, "--approximate")
    assert code == 2 and "--approximate measures on --texts QUESTIONS" in err
    assert not file.exists()
    assert call(*export, "--approximate", "--texts", questions)[0] == 0
    code, out, err = call("apply", file, *ASK, "--json")
    assert code == 0, err
    assert all(set(row) == {"before", "after"} for row in json.loads(out)) and len(json.loads(out)) == 2


def test_what_is_lost_stands_in_a_native_file_too(call, run, questions, tmp_path):
    file = tmp_path / "x.json"
    export = ["export", run.path, "--edit", "clamp:formal=2", "--out", file, "--approximate", "--texts", questions]
    assert call(*export)[0] == 0
    lost = load_intervention(file).approximation
    assert lost is not None
    assert lost["stands_for"] == ["clamp at answer"] and 0 < lost["explained"] <= 1
    assert lost["prompts"] == lost["held_out_prompts"] == 3
    assert json.loads(file.read_text())["evidence"]["rankings"]


def test_applying_a_file_is_trying_its_edit(call, run, tmp_path):
    file, edit = tmp_path / "x.json", ("--edit", "clamp:formal=2", "--positions", "0:40")
    assert call("export", run.path, "--out", file, *edit)[0] == 0
    (one,) = load_intervention(file).edits
    assert str(one.positions) == "0:40"
    code, out, err = call("apply", file, *ASK)
    assert code == 0, err
    assert out.count("->") == 2
    assert call("apply", file, *ASK, "--sae", run.path)[1] == call("apply", file, *ASK, "--sae", run.sae)[1] == out


def test_files_that_cannot_be_applied_are_one_line(call, run, tmp_path):
    assert call("export", run.path, "--out", tmp_path / "x.json", "--edit", "ablate:1")[0] == 0
    raw = json.loads((tmp_path / "x.json").read_text())
    for changed, wanted in (
        ({"format": 9}, "not an intervention of format 1 or 2 (found 9)"),
        ({"layer_base": 1}, "counts layers from 1"),
        ({"model": {**raw["model"], "config_hash": "0" * 64}}, "was made for lab of config 00000000"),
        ({"edits": [{**raw["edits"][0], "latent": 999}]}, "edits latent 999, its SAE has latents 0 to 255"),
    ):
        (tmp_path / "x.json").write_text(json.dumps({**raw, **changed}))
        code, out, err = call("apply", tmp_path / "x.json", *ASK)
        said = [line for line in err.splitlines() if line.startswith("sae-persona: ")]
        assert (code, out, len(said)) == (2, "", 1)
        assert wanted in said[0]
    code, _, err = call("export", run.path, "--out", tmp_path / "y.json", "--edit", "ablate:1", "--format", "onnx")
    assert code == 2 and "a format is one of native, steer-py" in err


def test_what_cannot_be_tried_is_refused_in_one_line(call, run):
    plain = ["try", run.path, "who are you ?", "--edit", "clamp:3=1"]
    for arguments, message in (
        ([*plain, "--positions", "5:2"], "spans of tokens read START:STOP with 0 <= START < STOP, got 5:2"),
        ([*plain, "--positions", "last"], "positions is one of answer, pre"),
        ([*plain, "--n", 0], "--n counts answers from 1, got 0"),
        (["try", run.path, " ", "--edit", "clamp:3=1"], "the prompt is empty: give what the user says"),
    ):
        code, out, err = call(*arguments)
        said = [line for line in err.splitlines() if line.startswith("sae-persona: ")]
        assert code == 2 and not out and len(said) == 1 and message in said[0], err
    code, out, err = call(*plain, "--positions", "3:5", "--n", 1)
    assert code == 0 and "->" in out


def test_a_clamp_far_beyond_the_latent_is_warned_of(run):
    with pytest.warns(FarBeyond, match="clamp of latent 3 to .* times the most that it ever reached"):
        edits_of(run, ["clamp:3=1000"])
    edits_of(run, ["clamp:3=2", "ablate:3"])
