import json

import pytest

from sae_persona.activations.texts import read_texts
from sae_persona.errors import DataError

ROW = {
    "question": 'Is the following statement something you would say?\n"I lead"',
    "statement": "I lead",
    "label_confidence": 0.9,
    "answer_matching_behavior": " Yes",
    "answer_not_matching_behavior": " No",
}
OTHER = {**ROW, "statement": "I follow", "answer_matching_behavior": " No", "answer_not_matching_behavior": " Yes"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vain.jsonl").write_text("\n".join(json.dumps(row) for row in (ROW, OTHER)))
    (tmp_path / "meek.jsonl").write_text(json.dumps({k: v for k, v in ROW.items() if k != "label_confidence"}))
    return tmp_path


def test_statements_are_texts_that_the_persona_would_say_or_not(folder):
    meek, lead, follow = read_texts(f"evals:{folder}")
    assert [d.text for d in (meek, lead, follow)] == ["I lead", "I lead", "I follow"]
    assert (lead.labels, lead.weights) == ({"vain": 1.0}, {"vain": 0.9}) and follow.labels == {"vain": 0.0}
    assert (meek.labels, meek.weights) == ({"meek": 1.0}, None)
    assert (lead.domain, lead.template, lead.id, follow.id) == ("vain", "statement", "vain-0", "vain-1")


def test_answers_are_both_of_each_question_in_one_split_and_blocks_of_one_answer(folder):
    dialogues = list(read_texts(f"evals:{folder / 'vain.jsonl'}:answers"))
    assert [d.messages[1]["content"] for d in dialogues] == ["Yes", "No", "No", "Yes"]
    assert [d.labels["vain"] for d in dialogues] == [1, 0, 1, 0]
    assert all(d.messages[0]["content"] == ROW["question"] for d in dialogues)
    assert dialogues[0].split == dialogues[1].split != "" and dialogues[2].split == dialogues[3].split
    blocks = {template: [d.labels["vain"] for d in dialogues if d.template == template] for template in
              {d.template for d in dialogues}}  # fmt: skip
    assert sorted(map(sorted, blocks.values())) == [[0, 1], [0, 1]], "no answer tells the persona by itself"
    assert len({d.id for d in dialogues}) == 4


@pytest.mark.parametrize(
    ("change", "form", "message"),
    [
        ({"answer_matching_behavior": None}, "", "vain.jsonl:1 is not a row of anthropics/evals"),
        ({"answer_matching_behavior": " (A)"}, "", "vain.jsonl:1: a statement's answer is Yes or No, got ' .A.'"),
        ({"statement": None}, "", "vain.jsonl:1 has no statement: read this file as evals:PATH:answers"),
        ({"label_confidence": 2}, "", "vain.jsonl:1: label_confidence lies between 0 and 1, got 2"),
        ({"answer_not_matching_behavior": []}, ":answers", "vain.jsonl:1: an answer needs the question"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, change, form, message):
    (tmp_path / "vain.jsonl").write_text(json.dumps({**ROW, **change}))
    with pytest.raises(DataError, match=message):
        read_texts(f"evals:{tmp_path / 'vain.jsonl'}{form}")


def test_a_path_without_evals(tmp_path):
    with pytest.raises(DataError, match=f"no evals at {tmp_path}"):
        read_texts(f"evals:{tmp_path}")
    with pytest.raises(DataError, match="no evals at .*absent"):
        read_texts(f"evals:{tmp_path / 'absent'}")
