import json

import pytest

from sae_persona.errors import FormatError
from sae_persona.features.descriptions import Description, Descriptions
from sae_persona.runs import Run

ROWS = [
    Description(latent=7, promoted=((" é\u2028", 1.5),), suppressed=(("b", -0.5),), concentration=0.5),
    Description(latent=2, explanation="cats", detection=0.75, explainer="hf:x", error="fuzzing: no"),
]


@pytest.fixture
def run(tmp_path):
    run = Run.create(tmp_path / "run")
    Descriptions("abc", {}).with_new(ROWS).save(run)
    return run


def test_goes_through_a_file(run):
    found = Descriptions.load(run)
    assert list(found) == [2, 7] and [found[7], found[2]] == ROWS and (found.sae, found.z_scored) == ("abc", False)


def test_the_file_is_what_others_read(run):
    header, first, second = map(json.loads, run.descriptions.read_text(encoding="utf-8").split("\n")[:-1])
    assert header == {"kind": "descriptions", "format": 1, "sae": "abc", "z_scored": False, "n": 2}
    assert first == {
        "latent": 2, "promoted": [], "suppressed": [], "concentration": None, "input_score": None,
        "output_score": None, "explanation": "cats", "detection": 0.75, "fuzzing": None, "explainer": "hf:x",
        "error": "fuzzing: no",
    }  # fmt: skip
    assert second["promoted"] == [[" é\u2028", 1.5]]


def test_new_ones_take_the_place_of_old_ones(run):
    found = Descriptions.load(run).with_new([Description(latent=2, explanation="dogs")])
    assert found[2].explanation == "dogs" and found[2].detection is None and found[7] == ROWS[0]


def test_text_has_what_is_known():
    assert str(ROWS[0]).splitlines()[0].startswith('promotes " é')
    assert "concentration 0.50" in str(ROWS[0]) and "None" not in str(ROWS[0])
    assert "hf:x: cats" in str(ROWS[1]) and "fuzzing: no" in str(ROWS[1]) and "detection 0.75" in str(ROWS[1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text[:-20], "not a whole|wanted whole"),
        (lambda text: text[: text[:-1].rindex("\n") + 1], "has 1 of 2 descriptions"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2, wanted whole descriptions format 1"),
        (lambda text: text.replace('"descriptions"', '"latents"'), "holds latents"),
        (lambda text: text.replace('"fuzzing"', '"fuzz"'), "fuzz"),
        (lambda text: "", "not a whole"),
        (lambda text: "[]\n", "not a whole"),
    ],
)
def test_what_is_no_such_file_is_refused(run, change, told):
    run.descriptions.write_text(change(run.descriptions.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(FormatError, match=told):
        Descriptions.load(run)


def test_no_file(tmp_path):
    with pytest.raises(FormatError, match="no descriptions at .*: `sae-persona describe"):
        Descriptions.load(Run.create(tmp_path / "run"))
