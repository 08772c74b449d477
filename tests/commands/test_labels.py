import json

import pytest

from sae_persona.activations.texts import read_texts


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    made = [{"text": f"text {i} of {i * 7} , {i * 11} and {i * 13}", "labels": {"vain": i % 2}, "id": i,
             "template": f"t{i // 2 % 6}"} for i in range(60)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_split_then_check(call, rows, tmp_path):
    out = tmp_path / "split.jsonl"
    code, shown, err = call("labels", "split", rows, "--by", "template", "--held-out", "0.5", "--out", out)
    assert code == 0, err
    assert shown == f"{out}: 30 train, 30 held-out\n"
    code, shown, err = call("labels", "check", out, "--json")
    found = json.loads(shown)
    assert code == 0, err
    assert found["holds"] and found["groups"][0]["shared"] == 0
    assert "vain" in call("labels", "check", out)[1]
    code, _, err = call("labels", "split", rows, "--out", out)
    assert code == 2 and "is there already" in err
    assert call("labels", "split", rows, "--out", out, "--force", "--seed", "3")[0] == 0


def test_a_split_in_which_a_persona_cannot_be_ranked_is_told(call, tmp_path):
    """Domains go whole to one split, so a persona that is labelled in one domain only is in one split only."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "split.jsonl"
    made = [{"text": f"text {i} of {i * 7} and {i * 13}", "domain": f"d{i % 2}",
             "labels": {f"trait{i % 2}": i // 2 % 2, "vain": i // 2 % 2}} for i in range(120)]  # fmt: skip
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    code, _, err = call("labels", "split", rows, "--by", "domain", "--out", out)
    assert code == 0 and "too few examples to rank trait0, trait1:" in err
    assert call("labels", "check", out, "--within", "")[0] == 1
    assert "too few" not in call("labels", "split", rows, "--by", "id", "--out", out, "--force")[2]


def test_what_does_not_hold_exits_1_and_mistakes_exit_2(call, rows, tmp_path):
    text = rows.read_text().splitlines()
    rows.write_text("\n".join([*text, json.dumps({**json.loads(text[0]), "id": "again"})]))
    code, shown, err = call("labels", "check", rows, "--words", "3")
    assert code == 1 and "ids that stand twice: none" in shown and "leaks, ids that stand twice" in err
    code, _, err = call("labels", "check", tmp_path / "absent.jsonl")
    assert code == 2 and err.count("\n") == 1
    code, _, err = call("labels", "split", rows, "--by", "author", "--out", tmp_path / "x.jsonl")
    assert code == 2 and "have no author" in err and not (tmp_path / "x.jsonl").exists()


def test_join(call, rows, tmp_path):
    labels, out = tmp_path / "more.csv", tmp_path / "joined.jsonl"
    labels.write_text("id,meek\n3,1\n")
    code, _, err = call("labels", "join", rows, labels, "--out", out)
    assert code == 0, err
    joined = list(read_texts(out))
    assert joined[3].labels == {"vain": 1.0, "meek": 1.0} and len(joined) == 60
    labels.write_text("id,meek\n99,1\n")
    assert "no dialogue has id '99'" in call("labels", "join", rows, labels, "--out", out, "--force")[2]
    assert list(read_texts(out))[3].labels == {"vain": 1.0, "meek": 1.0}
