"""`scan` as a user meets it: a corpus into scan.h5, by one process or by several."""

import json
import shutil

import pytest

from sae_persona.features.scan import Scan
from sae_persona.lab import corpora
from sae_persona.runs import Run

SMALL = ["--contexts", "2", "--sampled", "4", "--cofiring-tokens", "500", "--limit-tokens", "3k"]


@pytest.fixture
def run(demo_run, tmp_path):
    """A copy of the small run, to be changed at will."""
    return Run(shutil.copytree(demo_run.path, tmp_path / "run"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    corpora.write_texts(folder, n=60, n_labelled=4, n_questions=2, seed=0)
    return folder / "corpus.jsonl"


def test_scans_a_corpus_and_shows_what_it_found(call, run, texts):
    code, shown, err = call("scan", run.path, texts, *SMALL, "--json")
    assert code == 0, err
    facts = json.loads(shown)
    found = Scan.load(run.scan)
    assert facts["n_tokens"] == found.stats.n_tokens >= 3000 and facts["shares"] == ["0/1"]
    assert "token" in err and run.stage("scan")["tokens"] == facts["n_tokens"]
    latent = int(found.stats.fired.argmax())
    code, shown, err = call("show", run.path, latent)
    assert code == 0, err
    assert "a sample of its firings" in shown and "fires together with" in shown
    facts = json.loads(call("show", run.path, latent, "--json")[1])
    assert facts["firing_rate"] == pytest.approx(float(found.stats.firing_rate[latent]))
    assert len(facts["contexts"]) == 2 and len(facts["sampled"]) == 4 and facts["first"] <= facts["last"]
    assert facts["cofiring"]["neighbours"][0]["both"] <= facts["cofiring"]["fires"]
    assert f"{found.stats.n_tokens} tokens" in call("dead", run.path)[1]
    assert call("report", run.path)[0] == 0


def test_shares_in_files_merge_into_the_run(call, run, texts, tmp_path):
    parts = [tmp_path / "0.h5", tmp_path / "1.h5"]
    for rank, part in enumerate(parts):
        code, _, err = call("scan", run.path, texts, *SMALL, "--share", f"{rank}/2", "--out", part)
        assert code == 0, err
    assert not run.scan.exists() and not run.has("scan")
    code, shown, err = call("scan", "merge", run.path, parts[0])
    assert (code, shown, err) == (2, "", "sae-persona: share 1/2 of the corpus is missing: scan it and give it, too\n")
    assert not run.scan.exists() and not run.has("scan")
    code, shown, err = call("scan", "merge", run.path, *parts)
    assert code == 0, err
    assert Scan.load(run.scan).missing == [] and run.stage("scan")["tokens"] >= 3000
    code, _, err = call("scan", "merge", run.path, parts[0], parts[0])
    assert code == 2 and "is there twice" in err


def test_mistakes_are_one_line_and_leave_the_old_file(call, run, texts, tmp_path):
    assert call("scan", run.path, texts, *SMALL)[0] == 0
    before = run.scan.read_bytes()
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    for arguments, said in (
        ((tmp_path / "none.jsonl",), "no texts at"),
        ((tmp_path / "empty.jsonl",), "none of the texts has"),
        ((texts, "--device", "tpu"), "cpu, cuda"),
        ((texts, "--dtype", "int8"), "dtype is one of"),
        ((texts, "--share", "0/2"), "give --share and --out together"),
        ((texts, "--out", tmp_path / "x.h5"), "give --share and --out together"),
        ((texts, "--share", "2/2", "--out", tmp_path / "x.h5"), "RANK/WORLD"),
        ((texts, "--share", "0/2", "--out", tmp_path), "is a folder"),
        ((texts, "--context-size", "1"), "context_size must be at least 2"),
    ):
        code, shown, err = call("scan", run.path, *arguments)
        assert (code, shown) == (2, "") and said in err.splitlines()[-1], (arguments, err)
        assert "Traceback" not in err
    assert run.scan.read_bytes() == before and not (tmp_path / "x.h5").exists()


def test_a_dry_run_tells_what_it_takes(call, run, texts):
    code, shown, err = call("scan", run.path, texts, "--dry-run")
    assert code == 0, err
    assert "MB  contexts" in shown and "256 latents at" in shown and not run.scan.exists()
