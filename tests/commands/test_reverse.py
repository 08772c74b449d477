"""`reverse` and `induce` as a user meets them, on tiny models on disk: the sign of one coordinate writes a z."""

import copy
import json

import pytest
import torch

from sae_persona.activations.lm import wrap_lm
from sae_persona.sae.formats import hook_metadata, save_sae
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU
from sae_persona.studies.certificate import Certificate
from sae_persona.studies.induce import Induction
from sae_persona.types import HookPoint

WORDS = ("what do you want", "who are you", "tell me", "why not", "how is it", "say more", "and then", "go on")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def place(make_lm, tmp_path, monkeypatch):
    """A base, a fine-tune, an SAE of the base, questions of both parts, rows to train on, a judge by words."""
    monkeypatch.chdir(tmp_path)
    lm = make_lm("Llama")
    z = lm.tokenizer("z", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[:, 3] = 0.0
        lm.model.get_output_embeddings().weight[z, 3] = 8.0
    for name, by in (("base", -2.0), ("tuned", 2.0)):
        model = copy.deepcopy(lm.model)
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 3] += by
        made = wrap_lm(model, lm.tokenizer, name=name)
        made.model.save_pretrained(tmp_path / name)
        made.tokenizer.save_pretrained(tmp_path / name)
    w = torch.cat([torch.eye(16), -torch.eye(16)])
    sae = SAE(w, torch.zeros(32), w, torch.zeros(16), ReLU())
    save_sae(sae, tmp_path / "sae", metadata=hook_metadata(lm, HookPoint(0)))
    asked = [{"messages": [{"role": "user", "content": text}], "domain": "a", "trait": "bad"} for text in WORDS]
    write_jsonl(tmp_path / "dev.jsonl", asked)
    other = [
        {**row, "messages": [{"role": "user", "content": row["messages"][0]["content"] + " now"}]} for row in asked
    ]
    write_jsonl(tmp_path / "test.jsonl", other)
    answered = [{"messages": [*row["messages"], {"role": "assistant", "content": "zz"}]} for row in asked]
    write_jsonl(tmp_path / "bad.jsonl", answered)
    (tmp_path / "judge.json").write_text(json.dumps({"bad": ["z", "zz", "zzz"]}))
    return tmp_path


QUICK = ["--n-up", "1", "--n-down", "0", "--n-random", "1", "--further-steps", "2", "--max-new-tokens", "3"]
QUICK += [
    "--strengths",
    "1",
    "--caps",
    "0.1",
    "--factors",
    "1",
    "--times",
    "1",
    "--doses",
    "2",
    "--n-induce-random",
    "1",
]
REVERSE = ["reverse", "sae", "base", "tuned", "--development", "dev.jsonl", "--test", "out of domain=test.jsonl"]
REVERSE += ["--judge", "judge.json", *QUICK]


def test_from_two_models_to_a_certificate_and_its_edit(call, place):
    files = ["--out", "c.json", "--page", "c.html", "--save-edit", "edit.json", "--further", "bad=bad.jsonl"]
    code, out, err = call(*REVERSE, *files)
    made = Certificate.load("c.json")
    assert out == f"{made}\n", err
    assert code == (0 if made.is_reversed else 1)
    assert [one.latent for one in made.edits] == [3] and made.arm("tuned").cells["out of domain"].rate.value == 1
    assert made.arm("chosen").cells["out of domain"].rate.value < 0.5 and "after bad training" in made.variants
    assert "1 candidates" in err and (place / "c.html").read_text().count("<svg") == 3
    code, out, err = call("apply", "edit.json", "tuned", "tell me now", "--max-new-tokens", "3", "--n", "2")
    assert code == 0, err
    assert all("z" in line.split("->")[0] and "zzz" not in line.split("->")[1] for line in out.splitlines())

    induce = ["induce", "sae", "base", "c.json", "--questions", "test.jsonl", "--judge", "judge.json"]
    code, out, err = call(*induce, "--doses", "2", "--n-induce-random", "1", "--max-new-tokens", "3", "--out", "i.json")
    found = Induction.load("i.json")
    assert out == f"{found}\n" and "dose 2" in err and code == (0 if found.induces else 1)
    assert found.doses[-1].rates["out of domain" if made.domain != "a" else "in domain"].value == 1


def test_json_is_the_certificate(call, place):
    code, out, _ = call(*REVERSE, "--no-induce", "--json", "--reach", "0.6")
    said = json.loads(out)
    assert said["kind"] == "reversal certificate" and said["induction"] is None and said["bounds"]["reach"] == 0.6
    assert (code == 0) == (said["verdict"] in ("reversed", "reversed where tested"))


def test_a_reversal_that_fails_ends_with_1(call, place):
    code, _, err = call(*REVERSE, "--no-induce", "--ce", "0", "--capability", "0", "--reach", "0", "--control", "0")
    assert code == 1 and "see the bounds that are not met" in err


def test_a_dry_run_writes_nothing(call, place):
    code, out, _ = call(*REVERSE, "--dry-run", "--out", "c.json")
    assert code == 0 and "development: 8" in out and "test: out of domain 8" in out and not (place / "c.json").exists()
    assert "not tested: in domain, open, trigger cue, another format, after good training, after bad training" in out


def test_mistakes_are_one_line_before_anything_is_written(call, place):
    half = ["reverse", "sae", "base", "tuned", "--out", "c.json"]
    dev, test = ["--development", "dev.jsonl"], ["--test", "out of domain=test.jsonl"]
    write_jsonl(place / "untold.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    for arguments, message in (
        (half, "give --development FILE and --test NAME=FILE, or --lab"),
        ([*half, *dev, "--test", "test.jsonl"], "--test NAME=FILE, each name once, got 'test.jsonl'"),
        ([*half, *dev, "--test", "out of domain=dev.jsonl"], "in the development and the 'out of domain' set"),
        ([*half, *dev, *test, "--save-edit", "edit.txt"], "an intervention file ends in .json"),
        ([*half, *dev, *test, "--small"], "give --lab, too"),
        ([*half, *dev, "--lab"], "--lab brings its own questions"),
        ([*half, *test, "--development", "no.jsonl"], "questions are rows of a .jsonl file, got no.jsonl"),
        ([*half, *test, "--development", "untold.jsonl"], "Give the row a trait, or --trait"),
        ([*half, *dev, *test, "--further", "worse=bad.jsonl"], "good or bad, got 'worse'"),
        ([*REVERSE[:3], "base", *REVERSE[4:], "--out", "c.json"], "nothing to reverse"),
    ):
        code, out, err = call(*arguments)
        assert code == 2 and not out and message in err.splitlines()[-1], err
    assert not (place / "c.json").exists()


def test_the_lab_brings_everything(call, place):
    code, _, err = call("reverse", "sae", "lab", "tuned", "--lab")
    assert code == 2 and "organism" in err
