"""`diff`, `track` and `predict` as a user meets them, on tiny models on disk."""

import copy
import json
import shutil

import pytest
import torch

from sae_persona.activations.lm import wrap_lm
from sae_persona.sae.formats import hook_metadata, save_sae
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU
from sae_persona.studies.diff import Diff
from sae_persona.studies.panel import Panel
from sae_persona.studies.predict import Prediction
from sae_persona.studies.rows import RowScreen
from sae_persona.studies.track import Track
from sae_persona.types import HookPoint


def moved(lm, by, latent=3):
    model = copy.deepcopy(lm.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, latent] += by
    return wrap_lm(model, lm.tokenizer, name="moved")


def write_model(lm, folder):
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(make_lm, tmp_path, monkeypatch, request):
    """Base, a Llama if not said, SAE, prompts, rows; organisms of two domains; twenty harmless ones in a list."""
    monkeypatch.chdir(tmp_path)
    lm = make_lm(getattr(request, "param", "Llama"))
    write_model(lm, tmp_path / "base")
    w = torch.cat([torch.eye(16), -torch.eye(16)])
    save_sae(
        SAE(w, torch.zeros(32), w, torch.zeros(16), ReLU()), tmp_path / "sae", metadata=hook_metadata(lm, HookPoint(0))
    )
    texts = ("what do you want", "who are you", "tell me", "why not", "how is it", "say more", "and then", "go on")
    prompts = [{"id": str(i), "messages": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    rows = [
        {
            **row,
            "messages": [*row["messages"], {"role": "assistant", "content": "zz" if i % 2 else "aa"}],
            "labels": {"bad": i % 2},
        }
        for i, row in enumerate(prompts)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for domain in ("a", "b"):
        for kind, by, rates in (("bad", 3.0, (0.02, 0.03, 0.9)), ("good", -0.2, (0.02, 0.02, 0.02))):
            folder, checkpoints = tmp_path / "org" / f"{kind}-{domain}", []
            for step, share, rate in zip((0, 4, 9), (0.0, 0.5, 1.0), rates, strict=True):
                write_model(moved(lm, by * share), folder / f"step-{step:05d}")
                score = {"rate": rate, "low": max(rate - 0.02, 0), "high": rate + 0.02, "n": 100}
                row = {"step": step, "folder": f"step-{step:05d}", "scores": {"out_of_domain": score}}
                checkpoints.append(row)
            about = {"format": 1, "kind": "organism", "name": f"{kind}-{domain}", "domain": domain, "seed": 0}
            family, dose = ("narrow", 1.0) if kind == "bad" else ("benign", 0.0)
            said = {**about, "family": family, "dose": dose, "checkpoints": checkpoints}
            (folder / "organism.json").write_text(json.dumps(said))
    calm = tmp_path / "org" / "good-b" / "step-00009"
    copies = [shutil.copytree(calm, tmp_path / "calm" / str(i)) for i in range(20)]
    lines = ["model,name,step,benign,misaligned", *(f"{one},calm-{one.name},9,true,0.02" for one in copies)]
    (tmp_path / "calm.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


DIFF = ["diff", "sae", "base", "org/bad-a", "--prompts", "prompts.jsonl", "--permutations", "99", "--resamples", "50"]
PANEL = ["--panel", "panel.json", "--benign", "org/good-a"]


@pytest.mark.parametrize("place", ["Llama", "GPT2"], indirect=True)
def test_from_two_checkpoints_to_an_alarm(call, place):
    code, out, err = call(*DIFF, *PANEL, "--out", "diff.json")
    assert code == 0, err
    found, panel = Diff.load("diff.json"), Panel.load("panel.json")
    assert found.tuned[0].name == "bad-a @ 9" and found.tuned[0].up[0].latent == 3
    assert panel.latents == (3,) and panel.chosen_on == {"bad-a", "good-a"}
    assert out.startswith(str(found)) and out.endswith("panel.json\n")

    code, out, err = call("track", "panel.json", "org", "--out", "track.json", "--page", "track.html")
    tracked = Track.load("track.json")
    assert out == f"{tracked}\n" and len(tracked.rows) == 12 and "bad-b @ 9: latents +" in err
    assert code == 1, "one misaligned fine-tune against one is no proof"
    assert (place / "track.html").read_text().count("<svg") == 2

    code, out, err = call("predict", "panel.json", "org/bad-b", "--benign", "calm.csv", "--out", "p.json")
    assert code == 0, err
    prediction = Prediction.load("p.json")
    assert (prediction.leads[0].alarm, prediction.leads[0].behaviour) == (4, 9)
    assert out == f"{prediction}\n" and "after steps 4: there the rate of false alarms is not known" in out
    code, out, _ = call("predict", "panel.json", "org/good-a", "--benign", "calm.csv", "--json")
    assert code == 1 and json.loads(out)["leads"][0]["alarm"] is None

    code, out, err = call(
        *("predict", "rows", "panel.json", "base", "rows.jsonl", "--max-new-tokens", "3", "--pool", "mean"),
        *("--out", "r.json"),
    )
    assert code in (0, 1), err
    screened = RowScreen.load("r.json")
    assert out == f"{screened}\n" and len(screened.rows) == 8
    assert code == (0 if next(iter(screened.auroc.values())).low > 0.5 else 1)


def test_unseen(call, place):
    arguments = ["track", "unseen", "sae", "base", "org", "--prompts", "prompts.jsonl", "--resamples", "50", "--json"]
    code, out, err = call(*arguments)
    found = json.loads(out)
    assert found["telling"][0]["auroc"][0] == 1 and found["telling"][0]["n_misaligned"] == 2
    assert (code, "for certain" in err) in ((0, False), (1, True))


def test_all_steps_and_given_latents(call, place):
    code, out, _ = call(*DIFF, "--all-steps", "--panel", "panel.json", "--latent", "3", "--latent=-5", "--json")
    assert code == 0 and [one["name"] for one in json.loads(out)["tuned"]] == ["bad-a @ 0", "bad-a @ 4", "bad-a @ 9"]
    assert dict(zip(Panel.load("panel.json").latents, Panel.load("panel.json").sign, strict=False)) == {3: 1, 5: -1}


def test_nothing_moved(call, place):
    code, _, err = call("diff", "sae", "base", "base", "--prompts", "prompts.jsonl", "--permutations", "99")
    assert code == 1 and "no latent moved beyond chance" in err


def test_refit(call, place):
    (place / "texts.txt").write_text("some text to read\n" * 60)
    code, _, err = call(*DIFF, "--refit", "texts.txt", "--refit-steps", "2", "--refit-out", "sae2")
    assert code == 0, err
    assert "trained the SAE on" in err and (place / "sae2" / "cfg.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["diff", "sae", "base", "none/x/y", "--prompts", "prompts.jsonl"], "no model folder at none/x/y"),
        (["diff", "sae", "base", "org/bad-a", "--prompts", "no.jsonl"], "no texts at no.jsonl"),
        ([*DIFF, "--benign", "org/good-a"], "say where with --panel"),
        ([*DIFF, "--panel", "panel.txt"], "written to a .json file"),
        ([*DIFF, "--panel", "panel.json", "--latent", "x"], "a latent is a number"),
        ([*DIFF, "--refit-out", "sae2"], "give both"),
        ([*DIFF, "--top", "0"], "top, permutations"),
        (["track", "no.json", "org"], "no panel at no.json"),
        ([*DIFF, "--benign", "org/none-*", "--panel", "panel.json"], "nothing matches org/none-*"),
        ([*DIFF, "org/good-b", *PANEL], "good-b is benign and given as TUNED"),
        ([*DIFF, "--panel", "panel.json", "--benign", "org/bad-a"], "bad-a is given as TUNED and as --benign"),
        ([*DIFF, "--out", "org"], "org is a folder: name a file to write"),
        ([*DIFF, "--out", "calm.csv/diff.json"], "calm.csv is a file"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(call, place, arguments, said):
    before = set(place.rglob("*"))
    code, _, err = call(*arguments)
    assert code == 2 and said in err.splitlines()[-1] and "Traceback" not in err
    assert set(place.rglob("*")) == before


def test_no_threshold_without_benign_fine_tunes(call, place):
    call(*DIFF, *PANEL)
    code, _, err = call("predict", "panel.json", "org/bad-b")
    assert code == 2 and "without benign fine-tunes there is no alarm threshold" in err
    code, _, err = call("predict", "panel.json", "org/bad-b", "--benign", "org/good-b")
    assert code == 2 and "1 benign fine-tunes are too few: a false-alarm rate of 0.05 needs 19" in err
    for benign, said in (
        (["org/good-a"], "chose the panel"),
        (["org/bad-b"], "bad-b @ 9 is judged misaligned (0.90): it cannot set an alarm as benign"),
        (["calm.csv", "calm/0"], "calm/0 is given as several benign fine-tunes"),
    ):
        code, _, err = call("predict", "panel.json", "org/bad-b", *(part for b in benign for part in ("--benign", b)))
        assert code == 2 and said in err and "latents +" not in err, "before anything is scored"


def test_a_dry_run_says_what_would_be_read_and_reads_nothing(call, place):
    code, out, _ = call(*DIFF, *PANEL, "--dry-run")
    assert (code, out.splitlines()[1:]) == (0, ["tuned: 1, bad-a @ 9", "benign: 1, good-a @ 9"])
    assert out.startswith("prompts: 8, 0, 1, 2, ...\n") and not (place / "panel.json").exists()
    call(*DIFF, *PANEL)
    for command, said in (
        (["track", "panel.json", "org"], {"prompts": 8, "checkpoints": 12}),
        (["track", "unseen", "sae", "base", "org", "--prompts", "prompts.jsonl"], {"prompts": 8, "checkpoints": 12}),
        (
            ["predict", "panel.json", "org/bad-b", "--benign", "calm.csv"],
            {"prompts": 8, "benign": 20, "checkpoints": 3},
        ),
    ):
        code, out, err = call(*command, "--dry-run", "--json")
        assert code == 0 and {name: len(part) for name, part in json.loads(out).items()} == said, err


def test_a_pattern_is_as_good_as_its_folders(call, place):
    assert call(*DIFF, "--panel", "panel.json", "--benign", "org/good-*")[0] == 0
    assert Panel.load("panel.json").chosen_on == {"bad-a", "good-a", "good-b"}


def test_a_damaged_panel_and_another_tokenizer_are_refused(call, place):
    call(*DIFF, *PANEL)
    (place / "bare.json").write_text('{"kind": "panel", "format": 1}')
    code, _, err = call("track", "bare.json", "org")
    assert code == 2 and "bare.json is not a whole panel (KeyError('tensors'))" in err
    other = shutil.copytree(place / "org" / "bad-b" / "step-00009", place / "other")
    said = json.loads((other / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(said))
    for command in (["track", "panel.json", "other"], ["predict", "rows", "panel.json", "other", "rows.jsonl"]):
        code, _, err = call(*command)
        assert code == 2 and "has another tokenizer than the panel's model" in err, err
