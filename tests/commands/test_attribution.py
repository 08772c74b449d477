"""`screen` and `stability` as a user meets them, on copies of the small demo run."""

import json
import shutil

import pytest

from sae_persona.attribution.ranking import Ranking
from sae_persona.attribution.screens import Screen
from sae_persona.lab import corpora
from sae_persona.lab.contrasts import contrasts
from sae_persona.runs import Run, write_json


@pytest.fixture
def run(demo_run, tmp_path):
    return Run(shutil.copytree(demo_run.path, tmp_path / "run"))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", [r for part in corpora.SPLITS for r in contrasts("formal", 40, part)])


SMALL = ["--screened", "3", "--attributed", "1", "--controls", "20", "--integration", "1", "--resamples", "50"]


def test_screen(call, run, pairs):
    code, out, err = call("screen", run.path, "formal", pairs, *SMALL, "--controls", "60", "--positions", "answer")
    assert code in (0, 1), err
    saved = Screen.load(run.screen("formal"))
    assert out == f"{saved}\n"
    assert (code, err.count("has an effect")) == ((0, 0) if saved.causal else (1, 1))
    assert saved[0].latent == Ranking.load(run.ranking("formal"))[0].latent
    assert run.stage("screen")["persona"] == "formal" and run.stage("screen")["pairs"]["path"] == str(pairs)
    assert saved[0].verdict == "causal", "the one strong latent of formality moves the answers"


def test_clamping_counts_in_the_measured_percentile(call, run, pairs):
    code, out, err = call("screen", run.path, "formal", pairs, *SMALL, "--strength", "1", "--json")
    assert code in (0, 1), err
    assert json.loads(out)["rows"][0]["effect"][0] > 0


def test_pairs_come_from_the_measured_dialogues(call, run, tmp_path):
    """Where the run was measured on a file, and only while that file is what it was."""
    code, _, err = call("screen", run.path, "formal")
    assert code == 2 and "was measured on texts that are in no file: give contrast pairs as a file" in err
    rows = [row for part in corpora.SPLITS for row in corpora.labelled(150, part)]
    for row in rows:
        row["messages"] = [m for m in row["messages"] if m["role"] != "system"][-4:]  # the last two turns: fewer tokens
    texts = write_rows(tmp_path / "labelled.jsonl", rows)
    code, _, err = call("measure", run.path, texts, "--context-size", "200")
    assert code == 0 and "of the measurement before, and gone with it: rankings" in err
    assert call("rank", run.path, "formal", "--permutations", "99")[0] == 0
    code, out, err = call("screen", run.path, "formal", *SMALL)
    assert code in (0, 1), err
    assert "formal: latents ablated at 'pre'" in out and " held-out pairs on " in out
    write_rows(texts, rows[:-1])
    code, _, err = call("screen", run.path, "formal", *SMALL)
    assert code == 2 and "is not what" in err


def test_stability(call, run, demo_run):
    code, out, err = call("stability", "formal", demo_run.path, run.path, "--draws", "20", "--top", "5", "--json")
    assert code == 0, err
    found = json.loads(out)["comparisons"]
    assert [one["survival"] for one in found] == ["ranking", "ranking"]
    assert found[0]["a"] == str(demo_run.path) and found[0]["matched"] == 1
    assert "what survives" in call("stability", "formal", demo_run.path, run.path, "--draws", "20")[1]
    ranking = Ranking.load(run.ranking("formal")).to_json()
    for row in ranking["rows"]:
        row["z"] = -row["z"]
    write_json(run.ranking("formal"), ranking)
    code, _, err = call("stability", "formal", demo_run.path, run.path, "--draws", "20")
    assert code == 1 and "does not survive" in err


def test_rankings_made_otherwise_are_not_compared(call, run, demo_run):
    assert call("rank", run.path, "formal", "--permutations", "99", "--by", "activation")[0] == 0
    code, _, err = call("stability", "formal", demo_run.path, run.path, "--draws", "20")
    assert code == 2 and f"by is 'rank' in {demo_run.path} and 'activation' in {run.path}: rank again" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["screen", "{run}", "villain", "{pairs}"], "has no ranking for villain"),
        (["screen", "{run}", "formal", "no.jsonl"], "no pairs at no.jsonl"),
        (["screen", "{run}", "formal", "{pairs}", "--screened", "500"], "screened 500 is more than the"),
        (["stability", "formal", "{run}"], "two SAEs or more"),
        (["stability", "villain", "{run}", "{demo}"], "has no ranking for villain"),
        (["stability", "formal", "{run}", "{demo}", "{run}"], "name each run once"),
        (["rank", "{run}", "formal", "--given", "length", "--screen"], "rank without --given to screen"),
        (["rank", "{run}", "formal", "--words", "{pairs}"], "--words lists what --given trait_words counts"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(call, run, demo_run, pairs, arguments, said):
    code, _, err = call(*(part.format(run=run.path, demo=demo_run.path, pairs=pairs) for part in arguments))
    assert code == 2 and said in err.splitlines()[-1] and "Traceback" not in err
    assert not run.screen("formal").exists() and not run.has("screen")
