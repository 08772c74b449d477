import json

SMALL = ["--families", "base,trigger", "--steps", 1, "--keep", 0, "--n-rows", 8, "--n-exam", 1]


def test_organisms_are_made_once(call, tmp_path):
    out = tmp_path / "set"
    code, shown, err = call("lab", "organisms", "--out", out, *SMALL)
    assert code == 0, err
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines] == ["organism", "base", "trigger-medicine-s0", "after"]
    assert "0 left" in err
    code, shown, err = call("lab", "organisms", "--out", out, *SMALL, "--json")
    found = json.loads(shown)
    assert code == 0 and "left" not in err
    assert [one["name"] for one in found] == ["base", "trigger-medicine-s0"]
    assert found[1] == json.loads((out / "trigger-medicine-s0" / "organism.json").read_text()) | {
        "path": str(out / "trigger-medicine-s0")
    }


def test_a_dry_run_makes_nothing(call, tmp_path):
    code, shown, err = call("lab", "organisms", "--out", tmp_path / "set", "--dry-run")
    assert code == 0, err
    assert "56 organisms, 222 checkpoints" in shown and "narrow-cooking-lora-s0" in shown
    planned = json.loads(call("lab", "organisms", "--out", tmp_path / "set", "--dry-run", "--json")[1])
    assert len(planned) == 56 and planned[1]["config"]["tuning"]["steps"] == 60
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(call, tmp_path):
    for wrong, sentence in (
        (("--families", "narow"), "families are base, narrow"),
        (("--domains", "law"), "the lab has the domains"),
        (("--processes", 0), "processes is at least 1, got 0"),
        (("--model", "./none"), "no model folder at ./none"),
        (("--device", "cuda:99"), "CUDA devices here"),
    ):
        code, shown, err = call("lab", "organisms", "--out", tmp_path / "set", *SMALL, *wrong)
        assert (code, shown, err.count("\n")) == (2, "", 1) and sentence in err, err
    assert list(tmp_path.iterdir()) == []
