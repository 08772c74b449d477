"""Whatever a user gets wrong: exit status 2, one line that says what to do, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_persona import cli
from sae_persona.lab import corpora
from sae_persona.lab.card import FOLDER
from sae_persona.runs import Run, write_json
from sae_persona.sae.formats import load_sae, save_sae
from sae_persona.sae.model import SAE

SMALL = ["--n-latents", "16", "--k", "2", "--steps", "4", "--context-size", "64", "--tokens", "answers"]


@pytest.fixture
def run(demo_run, tmp_path):
    return Run(shutil.copytree(demo_run.path, tmp_path / "run"))


@pytest.fixture
def refused(monkeypatch, capsys):
    """Call the command line; it must say one line on stderr that holds ``wanted``, nothing on stdout, and exit 2."""

    def call(wanted, *arguments):
        monkeypatch.setattr(sys, "argv", ["sae-persona", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if line.startswith("sae-persona: ")]
        assert left.value.code == 2, err
        assert len(said) == 1, err
        assert wanted in said[0]
        assert out == ""

    return call


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in corpora.corpus(20)))
    return path


def labelled(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(*given):
    return ["train", *given, "--hook", "3", *SMALL]


def test_a_missing_file(refused, tmp_path):
    refused("none.jsonl", *train("lab", tmp_path / "none.jsonl", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "text"), [("a.txt", ""), ("a.txt", "\n \n"), ("a.jsonl", "")])
def test_an_empty_file(refused, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    refused(name, *train("lab", tmp_path / name, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_texts_shorter_than_a_token(refused, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    short = [*train("lab", tmp_path / "a.jsonl", "--out", tmp_path / "out")[:-1], "all"]
    refused("has a token", *short)
    refused("has an answer: --tokens answers needs dialogues", *short[:-1], "answers")
    assert not (tmp_path / "out").exists()


def test_a_hook_point_out_of_range(refused, corpus, tmp_path):
    bad = ["train", "lab", corpus, "--hook", "layers.9.resid_post", "--out", tmp_path / "out", *SMALL]
    refused("layers.9.resid_post does not exist: lab has layers 0 to 4. `sae-persona show lab` lists", *bad)
    refused("a hook point reads layers.LAYER.resid_post", *[*bad[:4], "mlp.3", *bad[5:]])
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(refused, corpus, tmp_path):
    refused("no model folder at", *train(tmp_path / "no" / "model", corpus, "--out", tmp_path / "out"))


def test_settings_that_cannot_be(refused, corpus, tmp_path):
    refused("k must be between 1 and n_latents", *train("lab", corpus, "--out", tmp_path / "out"), "--k", "99")
    refused("context_size must be at least 2", *train("lab", corpus, "--out", tmp_path / "out"), "--context-size", "1")


def test_nan_in_activations(refused, corpus, tmp_path):
    """A model with one broken weight: the run that was begun is gone again."""
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused("are not finite", *train(folder, corpus, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_persona(refused, run):
    refused("cheerful", "rank", run.path, "cheerfull")
    assert not run.ranking("cheerfull").exists()


def test_one_class_labels(refused, run, tmp_path):
    rows = [{**row, "labels": {"formal": 1}} for row in corpora.labelled(30, "train")]
    path = labelled(tmp_path / "one.jsonl", rows)
    monkey = ["measure", run.path, path, "--context-size", "200", "--tokens", "answers"]
    assert subprocess.run([sys.executable, "-m", "sae_persona", *map(str, monkey)], capture_output=True).returncode == 0
    refused("formal", "rank", run.path, "formal")


def test_labels_that_are_no_numbers(refused, run, tmp_path):
    rows = [{**row, "labels": {"formal": "very"}} for row in corpora.labelled(2, "train")]
    before = run.examples.read_bytes()
    refused("labels read", "measure", run.path, labelled(tmp_path / "bad.jsonl", rows), "--context-size", "200")
    assert run.examples.read_bytes() == before


def test_no_labels_at_all(refused, run, corpus):
    refused("no answer in these texts has labels", "measure", run.path, corpus, "--context-size", "200")


def test_an_sae_of_another_width(refused, run, tmp_path):
    sae = load_sae(run.sae)
    narrow = SAE(sae.w_enc[:, :7], sae.b_enc, sae.w_dec[:, :7], sae.b_dec[:7], sae.rule, sae.metadata)
    save_sae(narrow, run.sae)
    rows = labelled(tmp_path / "rows.jsonl", corpora.labelled(4, "train"))
    refused("width 7", "measure", run.path, rows, "--context-size", "200")


def test_a_corrupt_sae_folder(refused, run, tmp_path):
    rows = labelled(tmp_path / "rows.jsonl", corpora.labelled(4, "train"))
    weights = run.sae / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused("sae_weights.safetensors", "measure", run.path, rows, "--context-size", "200")
    (run.sae / "cfg.json").write_text("{")
    refused("cfg.json", "measure", run.path, rows, "--context-size", "200")


def test_a_run_of_another_version(refused, run):
    write_json(run.path / "manifest.json", {**run.manifest, "format": 0})
    refused("has run format 0, this version reads 1", "rank", run.path, "formal")


def test_a_folder_that_is_no_run(refused, tmp_path):
    refused("no run folder at", "rank", tmp_path / "none", "formal")
    refused("no run manifest at", "rank", tmp_path, "formal")


def test_a_stage_before_its_time(refused, run, tmp_path):
    manifest = run.manifest
    write_json(run.path / "manifest.json", {**manifest, "stages": manifest["stages"][:1]})
    refused("has no measure stage yet", "rank", run.path, "formal")


def test_edits_that_cannot_be(refused, run, tmp_path):
    refused("latent 256 does not exist", "try", run.path, "what do you want ?", "--edit", "clamp:256=1")
    refused("an edit reads clamp:LATENT=STRENGTH", "try", run.path, "what do you want ?", "--edit", "12=1")
    refused("latent 999 does not exist", "export", run.path, "--out", tmp_path / "x.json", "--edit", "ablate:999")
    assert not (tmp_path / "x.json").exists()


def test_questions_that_the_judge_does_not_know(refused, run, tmp_path):
    asked = [labelled(tmp_path / f"{i}.jsonl", [{"text": f"how are you {i} ?"}]) for i in (1, 2)]
    before = run.sweep("formal").read_bytes()
    refused("the lab's judge knows only the lab's questions", "sweep", run.path, "formal", *asked)
    assert run.sweep("formal").read_bytes() == before


def test_a_full_disk(refused, corpus, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount refused: {mounted.stderr.decode().strip()}")
    try:
        refused("No space left on device", *train("lab", corpus, "--out", disk / "out"), "--n-latents", "512")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_device_that_is_not_one(refused, corpus, tmp_path):
    refused(
        "a device reads cpu, cuda or cuda:N", *train("lab", corpus, "--out", tmp_path / "out"), "--device", "banana"
    )


def test_files_of_others_are_not_overwritten(refused, run, tmp_path):
    (tmp_path / "x.safetensors").write_text("theirs")
    refused("is there already", "export", run.path, "--out", tmp_path / "x.json", "--edit", "ablate:1")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    refused("is a folder with other things in it", "report", run.path, "--out", folder)
    assert (tmp_path / "x.safetensors").read_text() == "theirs"
    assert (folder / "precious.txt").exists()


def test_new_measurements_make_old_rankings_void(run, tmp_path, refused):
    rows = labelled(tmp_path / "rows.jsonl", corpora.labelled(30, "train"))
    done = subprocess.run(
        [sys.executable, "-m", "sae_persona", "measure", run.path, rows], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "30 labelled answers" in done.stdout
    refused("has no ranking for cheerful", "try", run.path, "what do you want ?", "--edit", "clamp:cheerful=1")


def test_answers_beyond_the_context_are_counted_aloud(run, tmp_path):
    rows = labelled(tmp_path / "rows.jsonl", corpora.labelled(30, "train"))
    short = ["measure", run.path, rows, "--context-size", "110"]
    done = subprocess.run([sys.executable, "-m", "sae_persona", *map(str, short)], capture_output=True, text=True)
    assert "labelled answers begin beyond 110 tokens: raise --context-size" in done.stderr


def test_nothing_here_needs_a_gpu():
    assert not torch.cuda.is_initialized()


def test_an_sae_that_is_not_the_measured_one(refused, run, tmp_path):
    sae = load_sae(run.sae)
    save_sae(SAE(sae.w_enc, sae.b_enc + 1, sae.w_dec, sae.b_dec, sae.rule, sae.metadata), run.sae)
    refused(
        "these statistics are of another SAE", "export", run.path, "--out", tmp_path / "x.json", "--edit", "ablate:1"
    )
    refused("these statistics are of another SAE", "try", run.path, "what do you want ?", "--edit", "ablate:1")
    assert not (tmp_path / "x.json").exists()
