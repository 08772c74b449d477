"""`prevent` and `realign` as a user meets them, on tiny models on disk."""

import copy
import json

import pytest
import torch

from sae_persona.activations.lm import wrap_lm
from sae_persona.sae.formats import hook_metadata, load_sae, save_sae
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU
from sae_persona.studies.panel import choose_panel, made_of
from sae_persona.studies.prevent import Prevention
from sae_persona.studies.readings import Reading, read_prompted, read_prompts
from sae_persona.studies.realign import Realignment
from sae_persona.types import HookPoint

TEXTS = ("what do you want", "who are you", "tell me", "why not", "how is it", "say more", "and then", "go on")


def write_model(lm, folder):
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def place(make_lm, tmp_path, monkeypatch):
    """Base, misaligned model, SAE, panel, rows and questions of a GPT-2, which has 64 positions."""
    monkeypatch.chdir(tmp_path)
    lm = make_lm("GPT2")
    model = copy.deepcopy(lm.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] += 3.0
    bad = wrap_lm(model, lm.tokenizer, name="bad")
    write_model(lm, tmp_path / "base")
    write_model(bad, tmp_path / "bad")
    w = torch.cat([torch.eye(16), -torch.eye(16)])
    sae = SAE(w, torch.zeros(32), w, torch.zeros(16), ReLU())
    save_sae(sae, tmp_path / "sae", metadata=hook_metadata(lm, HookPoint(0)))
    asked = [[{"role": "user", "content": text}] for text in TEXTS]
    prompts, readings = read_prompts([{"messages": messages} for messages in asked]), []
    for one in (lm, bad):
        found = read_prompted(one, HookPoint(0), prompts)
        readings.append(Reading(one.name, found.keys, found.x))
    opened = load_sae(tmp_path / "sae")
    choose_panel(opened, HookPoint(0), prompts, readings[0], readings[1:], [], about=made_of(lm)).save(
        tmp_path / "panel.json"
    )
    for name, answer in (("good", "aa"), ("worse", "zz")):
        rows = [{"messages": [*one, {"role": "assistant", "content": answer}], "domain": "a"} for one in asked]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    for name, mark in (("development", "?"), ("test", "!")):
        rows = [
            {
                "messages": [{"role": "user", "content": text + mark}],
                "domain": "ab"[i % 2] if i < 6 else "",
                "trait": "bad",
            }
            for i, text in enumerate(TEXTS)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "words.json").write_text(json.dumps({"bad": ["zz"]}))
    return tmp_path


QUICK = ["--max-new-tokens", "4", "--judge", "words.json", "--lr", "0.01", "--batch", "8"]
PREVENT = [
    *("prevent", "sae", "panel.json", "base", "worse.jsonl", "--development", "development.jsonl"),
    *("--test", "test.jsonl", "--held-out", "good.jsonl", "--steps", "3", "--steer", "0.2", "--penalty", "1"),
    *("--n-random", "1", *QUICK),
]
REALIGN = [
    *("realign", "panel.json", "base", "bad", "--good", "same=good.jsonl", "--bad", "worse.jsonl"),
    *("--questions", "test.jsonl", "--n-good", "8", "--n-bad", "4", "--healing-steps", "3"),
    *("--relearning-steps", "2", "--keep", "0,1", *QUICK),
]


def test_prevent(call, place):
    code, out, err = call(*PREVENT, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["fine_tunes"] == 7, err
    code, out, err = call(*PREVENT, "--out", "p.json")
    found = Prevention.load("p.json")
    assert out == f"{found}\n" and (code == 0) == any(map(found.works, found.methods))
    assert len(found.arms) == 8 and "steer latents 0.2: out of domain" in err
    assert found.domain == "a" and found.tuning["steps"] == 3 and found.tuning["keep"] == []


def test_realign(call, place):
    code, out, err = call(*REALIGN, "--dry-run")
    assert (code, out) == (0, "2 fine-tunes of 3 steps, 3 of 2\n"), err
    code, out, err = call(*REALIGN, "--out", "r.json", "--json")
    found = Realignment.load("r.json")
    assert json.loads(out) == found.to_json() and (code == 0) == found.heals
    assert [point.step for point in found.healings[0].points] == [0, 1, 3] and found.model == "bad"
    assert "healing on 8, same, step 3: out of domain" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*PREVENT[:4], "no.jsonl"], "there is none at no.jsonl"),
        ([*PREVENT, "--steer", "0"], "finite and above 0"),
        ([*PREVENT[:-2], "--test", "development.jsonl"], "in the development and the test set"),
        ([*PREVENT, "--judge", "none.json"], "no word list at none.json"),
        ([*REALIGN, "--good", "good.jsonl"], "good rows are given as SOURCE=FILE"),
        ([*REALIGN, "--n-good", "9"], "same has 8 rows, the config takes 9"),
        ([*REALIGN, "--bad", "panel.json"], "rows are read from a .jsonl file"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(call, place, arguments, said):
    before = set(place.rglob("*"))
    code, _, err = call(*arguments)
    assert code == 2 and said in err.splitlines()[-1] and "Traceback" not in err
    assert set(place.rglob("*")) == before
