import json
import math

import pytest

from sae_persona.activations.lm import LM
from sae_persona.errors import DataError, FormatError
from sae_persona.studies.snapshots import Snapshot, last_of_each, read_snapshots


def test_an_organism(make_organism, base):
    folder = make_organism("bad", {0: base, 20: base}, {0: 0.02, 20: 0.8})
    first, last = read_snapshots(folder)
    assert (first.label, last.label, last.step, last.dose, last.group) == ("bad @ 0", "bad @ 20", 20, 1.0, "a")
    assert last.misaligned.value == 0.8 and not last.benign and last.seed == 0
    assert last.is_misaligned(0.3) and not first.is_misaligned(0.3)
    assert isinstance(last.open(), LM) and last.open().d_model == base.d_model
    make_organism("good", {20: base}, {20: 0.0}, family="benign", dose=0.0)
    both = read_snapshots(folder.parent)
    assert [one.label for one in last_of_each(both)] == ["bad @ 20", "good @ 20"]
    assert both[-1].benign


def test_lists(tmp_path):
    (tmp_path / "one").mkdir()
    table = tmp_path / "list.csv"
    table.write_text("model,name,step,dose,misaligned,benign\none,a,3,0.5,0.25,false\nhub/two,b,,,,yes\n")
    one, two = read_snapshots(table)
    assert one.model == tmp_path / "one" and (one.step, one.dose, one.misaligned.value) == (3, 0.5, 0.25)
    assert two.model == "hub/two" and two.step is None and two.benign and math.isnan(two.misaligned.value)
    assert two.is_misaligned(0.3) is False, "nobody judged it, but it is known to be harmless"
    assert Snapshot(name="c", model="c").is_misaligned(0.3) is None
    rows = tmp_path / "list.jsonl"
    rows.write_text(json.dumps({"model": "hub/three", "misaligned": 0.5, "low": 0.4, "high": 0.6}) + "\n")
    assert read_snapshots(rows)[0].misaligned == (0.5, 0.4, 0.6)
    assert read_snapshots("lab")[0].model == "lab"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "a"}', "needs a model"),
        ('{"model": "a", "step": "x"}', "invalid literal"),
        ('{"model": "a", "misaligned": 3}', "a rate from 0 to 1"),
        ('{"model": "a", "benign": "perhaps"}', "true or false"),
    ],
)
def test_bad_lists(tmp_path, text, said):
    (tmp_path / "list.jsonl").write_text(text + "\n")
    with pytest.raises(DataError, match=said):
        read_snapshots(tmp_path / "list.jsonl")


def test_bad_folders(tmp_path, make_organism, base):
    with pytest.raises(DataError, match="holds no organism.json"):
        read_snapshots(tmp_path)
    folder = make_organism("bad", {0: base}, {0: 0.0})
    raw = json.loads((folder / "organism.json").read_text())
    (folder / "organism.json").write_text(json.dumps({**raw, "format": 9}))
    with pytest.raises(FormatError, match="not an organism of format 1"):
        read_snapshots(folder)
    del raw["dose"]
    (folder / "organism.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match="dose"):
        read_snapshots(folder)
