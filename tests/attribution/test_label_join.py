import json

import pytest

from sae_persona.activations.dialogues import Dialogue
from sae_persona.attribution.label_join import join_labels
from sae_persona.errors import DataError

TEXTS = [Dialogue(text="ahoy", labels={"pirate": 1.0}, id="a"), Dialogue(text="hello", id="b")]


def written(folder, *rows):
    path = folder / "labels.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_labels_are_added_by_id(tmp_path):
    more = written(tmp_path, {"id": "b", "labels": {"rude": 1}, "weights": 0.5}, {"id": "a", "covariates": {"age": 3}})
    a, b = join_labels(TEXTS, more)
    assert (a.labels, a.covariates, a.text) == ({"pirate": 1.0}, {"age": 3.0}, "ahoy")
    assert (b.labels, b.weights) == ({"rude": 1.0}, {"rude": 0.5})
    table = tmp_path / "labels.csv"
    table.write_text("id,pirate,rude,hard\na,0,1,1\n")
    a, b = join_labels(TEXTS, table)
    assert (a.labels, a.hard) == ({"pirate": 0.0, "rude": 1.0}, True) and b.labels is None


@pytest.mark.parametrize(
    ("texts", "row", "message"),
    [
        (TEXTS, {"id": "c", "labels": {"x": 1}}, "labels.jsonl:2: no dialogue has id 'c'"),
        (TEXTS, {"id": "a", "labels": {"x": 1}}, "labels.jsonl:2: id 'a' stands twice, first at .*labels.jsonl:1"),
        (TEXTS, {"labels": {"x": 1}}, "labels.jsonl:2 has no id"),
        (TEXTS, {"id": "b"}, "labels.jsonl:2 has nothing to add: give one of labels"),
        (TEXTS, {"id": "b", "labels": "x"}, "labels.jsonl:2: labels read"),
        ([*TEXTS, Dialogue(text="again", id="a")], {}, "id 'a' stands twice, at texts 0 and 2"),
        ([*TEXTS, "plain"], {}, "text 2 has no id, so no label can be put to it"),
        (
            [*TEXTS, Dialogue(({"role": "user", "content": "hi"},), id="q")],
            {"id": "q", "labels": {"x": 1}},
            "labels.jsonl:2: labels belong to the last answer, and dialogue q has none",
        ),
    ],
)
def test_what_does_not_fit(tmp_path, texts, row, message):
    with pytest.raises(DataError, match=message):
        join_labels(texts, written(tmp_path, {"id": "a", "labels": {"y": 0}}, row))
