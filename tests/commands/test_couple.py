"""`couple` as a user meets it, on the demo's run."""

import json
import shutil

import pytest

from sae_persona.attribution.rank import RankConfig
from sae_persona.lab.corpora import question_rows
from sae_persona.runs import Run
from sae_persona.stages.pipeline import rank_all_stage
from sae_persona.studies.coupling import Coupling

TRAITS = ("cheerful", "deceptive", "formal", "overconfident", "sarcastic", "toxic")


@pytest.fixture(scope="module")
def folder(demo_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("couple")
    made = Run.open(shutil.copytree(demo_run.path, folder / "run"))
    rank_all_stage(made, TRAITS, config=RankConfig(permutations=20))
    for name, part, n in (("development", "train", 2), ("test", "held_out", 4)):
        rows = [row for trait in ("deceptive", "malicious") for row in question_rows(trait, n, part)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def place(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


QUICK = [
    "couple",
    "run",
    "development.jsonl",
    "test.jsonl",
    "--permutations",
    "9",
    "--resamples",
    "20",
    "--budget",
    "0.3",
]


def test_couple(call, place):
    code, out, err = call(*QUICK, "--dry-run", "--rows", "lab")
    assert code == 0, err
    assert out == f"6 traits ({', '.join(TRAITS)}) by clamp, steer, fine-tune, on 8 questions\n"
    code, out, err = call(*QUICK, "--by", "steer", "--out", "c.json", "--page", "c.html")
    found = Coupling.load("c.json")
    assert out == f"{found}\n" and found.traits == TRAITS and [one.how for one in found.effects] == ["steer"]
    assert code == (0 if found.is_foretold() else 1) and err.count("steer ") == 6
    assert (place / "c.html").read_text().count("<svg") == 2
    (place / "c.json").unlink()
    (place / "c.html").unlink()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*QUICK, "--traits", "formal,toxic"], "6 different traits or more"),
        ([*QUICK, "--rows", "formal=no.jsonl"], "there is none at no.jsonl"),
        ([*QUICK, "--rows", "brave=test.jsonl"], "rows are given as TRAIT=FILE for one of cheerful"),
        ([*QUICK, "--by", ""], "nothing to move traits by"),
        ([*QUICK, "--by", "prompt"], "by is clamp and steer"),
        ([*QUICK[:2], "no.jsonl", "test.jsonl"], "no texts at no.jsonl"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(call, place, arguments, said):
    before = set(place.rglob("*"))
    code, _, err = call(*arguments)
    assert code == 2 and said in err.splitlines()[-1] and "Traceback" not in err
    assert set(place.rglob("*")) == before
