"""`search` and `match` as a user meets them."""

import json
import shutil
import sys

import numpy as np
import pytest

from sae_persona import cli
from sae_persona.attribution.ranking import Ranking
from sae_persona.features.matching import Matching
from sae_persona.lab import corpora
from sae_persona.runs import Run, write_json
from sae_persona.sae.formats import load_sae, save_sae
from sae_persona.sae.model import SAE


@pytest.fixture(scope="module")
def run(demo_run, tmp_path_factory):
    return Run(shutil.copytree(demo_run.path, tmp_path_factory.mktemp("cli") / "run"))


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process; returns exit status, stdout, and what it said itself on stderr."""

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["sae-persona", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
            sys.exit(0)
        out, err = capsys.readouterr()
        return left.value.code or 0, out, "".join(line for line in err.splitlines(True) if "Loading" not in line)

    return called


def test_a_search_by_everything(call, run, tmp_path):
    best = Ranking.load(run.ranking("formal"))[0].latent
    code, out, _ = call("search", run.path, "--persona", "formal", "--limit", "3")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["latent", "z", "auroc", "p_max_t", "rate", "about", "context"]
    assert len(lines) == 4
    assert lines[1].split()[0] == str(best)
    assert "[" in lines[1]

    np.save(tmp_path / "v.npy", load_sae(run.sae).w_dec[best].numpy())
    given = ["--vector", tmp_path / "v.npy", "--cosine", "0.5:", "--rate", ":0.9", "--auroc", "0.8:", "--alive"]
    code, out, _ = call("search", run.path, *given, "--json")
    assert code == 0
    hit = json.loads(out)[0]
    assert hit["latent"] == best
    assert hit["cosine"] == pytest.approx(1)
    assert hit["contexts"][0]["text"]

    code, out, _ = call("search", run.path, "--text", "kindly note that mice is the food for owls .", "--limit", "2")
    assert code == 0
    assert out.split()[:3] == ["latent", "surprise", "times"]
    assert call("search", run.path, "what ?", "--plain")[0] == 0


def test_nothing_found_is_a_no(call, run):
    for asked in (["zebra"], ["--rate", "0.999:"], ["?", "--plain"]):
        code, out, err = call("search", run.path, *asked, "--json")
        assert (code, json.loads(out)) == (1, [])
        assert err.endswith("nothing is found\n")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "nothing to search for"),
        (["food AND"], "does not parse: syntax error at its end"),
        (["food", "--rate", "much"], "a range reads LOW:HIGH, LOW: or :HIGH, got 'much'"),
        (["food", "--rate", "0.5"], "a range reads LOW:HIGH"),
        (["food", "--rate", "0.5:0.1"], "from low to high"),
        (["--vector", "none.npy"], "cannot read a vector from none.npy"),
        (["--like", "999"], "latent 999 does not exist"),
        (["--persona", "pirate"], "has no ranking for pirate"),
        (["--persona-vector", "pirate"], "no example is labelled 'pirate'"),
        (["food", "--order", "direction"], "there is no direction to order by"),
    ],
)
def test_a_mistake_is_one_line(call, run, asked, said):
    code, out, err = call("search", run.path, *asked)
    assert (code, out) == (2, "")
    assert said in err
    assert len([line for line in err.splitlines() if line.startswith("sae-persona: ")]) == 1


def test_a_run_that_is_not_measured(call, run, tmp_path):
    bare = Run(shutil.copytree(run.path, tmp_path / "run"))
    write_json(bare.path / "manifest.json", {**run.manifest, "stages": run.manifest["stages"][:1]})
    code, _, err = call("search", bare.path, "food")
    assert code == 2
    assert "has no measure stage yet" in err


@pytest.fixture(scope="module")
def reordered(run, tmp_path_factory):
    """The run's SAE with its latents from last to first."""
    sae, folder = load_sae(run.sae), tmp_path_factory.mktemp("saes") / "reordered"
    turned = (sae.w_enc.flip(0), sae.b_enc.flip(0), sae.w_dec.flip(0), sae.b_dec)
    save_sae(SAE(*turned, type(sae.rule)(sae.rule.threshold.flip(0)), sae.metadata), folder)
    return folder


def test_match(call, run, reordered, tmp_path):
    texts, out = tmp_path / "texts.jsonl", tmp_path / "m.h5"
    texts.write_text("".join(json.dumps(row) + "\n" for row in corpora.labelled(20, "train")))
    asked = ["match", run.path, reordered, "--out", out]
    reading = ["--texts", texts, "--context-size", "256", "--tokens", "answers"]
    code, shown, _ = call(*asked, *reading, "--top", "2", "--json")
    assert code == 0
    told = json.loads(shown)
    assert told["summary"]["mutual_above_0.9"] == 1
    assert told["summary"]["median_correlation"] == pytest.approx(1, abs=1e-4)
    assert [pair["a"] + pair["b"] for pair in told["pairs"]] == [255, 255]
    found = Matching.load(out)
    assert found.nearest_ab.tolist() == list(range(256))[::-1]
    code, shown, err = call(*asked)
    assert (code, shown) == (2, "")
    assert "is there already" in err
    code, shown, _ = call(*asked, "--force")
    assert code == 0
    assert "mutual_above_0.9" in shown
    assert Matching.load(out).correlation_ab is None


def test_dictionaries_that_do_not_go_together(call, run, tmp_path):
    sae = load_sae(run.sae)
    for name, metadata in (("hook", {"hook": "layers.1.resid_post"}), ("model", {"model": "other"})):
        save_sae(sae, tmp_path / name, metadata=metadata)
        texts = tmp_path / "texts.txt"
        texts.write_text("who are you ?\n")
        code, _, err = call("match", run.path, tmp_path / name, "--texts", texts, "--out", tmp_path / "m.h5")
        assert code == 2
        assert f"activations can be compared at one {name} only" in err
    narrow = SAE(sae.w_enc[:, :5], sae.b_enc, sae.w_dec[:, :5], sae.b_dec[:5], sae.rule, sae.metadata)
    save_sae(narrow, tmp_path / "narrow")
    code, _, err = call("match", run.path, tmp_path / "narrow", "--out", tmp_path / "m.h5")
    assert code == 2
    assert "compare SAEs of one hook point" in err
    assert "no SAE" in call("match", run.path, tmp_path / "none")[2]
    assert not (tmp_path / "m.h5").exists()
