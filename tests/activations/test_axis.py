import json
from collections import Counter

import pytest

from sae_persona.activations.texts import read_texts
from sae_persona.errors import DataError

TRAIT = {"instruction": [{"pos": "Be blunt.", "neg": "Be kind."}, {"pos": "Spare no one.", "neg": "Spare all."}]}
ROLE = {"instruction": [{"pos": "You are a pirate."}], "questions": ["Who are you?"]}
DEFAULT = {"instruction": [{"pos": ""}, {"pos": "You are {model_name}."}, {"pos": "Respond as yourself."}]}


@pytest.fixture
def folder(tmp_path):
    files = {"traits/instructions/blunt": TRAIT | {"questions": ["Is it good?", "Why?"], "eval_prompt": "..."}}
    files |= {
        "roles/instructions/pirate": ROLE,
        "roles/instructions/default": DEFAULT,
        "roles/role_list": {"pirate": ""},
    }
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def test_every_prompt_asks_every_question_and_awaits_its_answer(folder):
    dialogues = list(read_texts(f"axis:{folder}"))
    assert Counter((d.domain, *d.labels.items()) for d in dialogues) == {
        ("pirate", ("pirate", 1.0)): 1,
        ("pirate", ("pirate", 0.0)): 2,
        ("blunt", ("blunt", 1.0)): 4,
        ("blunt", ("blunt", 0.0)): 4,
    }
    assert all(d.unanswered for d in dialogues) and len({d.id for d in dialogues}) == 11
    plain = next(d for d in dialogues if d.id == "pirate-neg-0-0")
    assert [m["role"] for m in plain.messages] == ["user"], "an empty prompt is no message"
    assert not any("{model_name}" in m["content"] for d in dialogues for m in d.messages)
    blunt = next(d for d in dialogues if d.id == "blunt-neg-1-0")
    assert [m["content"] for m in blunt.messages] == ["Spare all.", "Is it good?"]
    assert (blunt.template, blunt.author) == ("Is it good?", "prompt-1")


def test_one_file_alone(folder):
    assert len(list(read_texts(f"axis:{folder / 'traits/instructions/blunt.json'}"))) == 8
    assert len(list(read_texts(f"axis:{folder / 'roles'}"))) == 3, "the list of roles is passed over"
    loose = (folder / "traits/instructions").rename(folder / "loose")
    assert len(list(read_texts(f"axis:{loose}"))) == 8


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "pirate.json is not JSON"),
        ("[1]", "pirate.json holds list"),
        ("{}", "pirate.json has no list under instruction"),
        (json.dumps({**ROLE, "questions": []}), "pirate.json has no list of questions"),
        (json.dumps({**ROLE, "instruction": [{"pos": 3}]}), "every pos is a system prompt, a text"),
        (json.dumps({**ROLE, "instruction": []}), "pirate.json has 0 prompts with the persona and 2 without"),
    ],
)
def test_a_bad_file_is_named(folder, value, message):
    (folder / "roles/instructions/pirate.json").write_text(value)
    with pytest.raises(DataError, match=message) as caught:
        list(read_texts(f"axis:{folder / 'roles'}"))
    assert "\n" not in str(caught.value)


def test_a_role_without_its_default(folder):
    (folder / "roles/instructions/default.json").unlink()
    with pytest.raises(DataError, match="pirate.json is a role, which is told from default.json beside it"):
        list(read_texts(f"axis:{folder / 'roles'}"))
    with pytest.raises(DataError, match="no instructions at"):
        read_texts(f"axis:{folder / 'absent'}")
