import json

import pytest

from sae_persona.activations.dialogues import Dialogue
from sae_persona.attribution.contrasts import Contrast, contrasts_of, read_contrasts, split_pairs
from sae_persona.errors import DataError

ASKED = [{"role": "user", "content": "why ?"}]
GOOD = {"messages": ASKED, "answers": {"with": "arr", "without": "because"}, "template": "t", "split": "train"}


def test_rows_become_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    plain = {"prompt": "once upon", "answers": {"with": " a", "without": " the"}}
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, plain)))
    first, second = read_contrasts(path)
    assert (first.persona_answer, first.other_answer, first.question) == ("arr", "because", "why ?")
    assert (first.template, first.split, second.prompt, second.question) == ("t", "train", "once upon", "once upon")
    assert read_contrasts([first, GOOD]) == [first, first]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": None}, "needs answers"),
        ({"answers": {"with": "arr"}}, "answer 'without' the persona is missing or blank"),
        ({"answers": {"with": " ", "without": "x"}}, "answer 'with' the persona is missing or blank"),
        ({"answers": {"with": "x", "without": "x"}}, "there is no contrast"),
        ({"messages": None}, "needs messages, or a prompt"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, "end with an answer"),
        ({"messages": [{"role": "user"}]}, "needs a role and a content"),
        ({"split": "test"}, "split is train or held_out"),
    ],
)
def test_a_bad_row_is_told_by_its_number(tmp_path, change, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, {**GOOD, **change})))
    with pytest.raises(DataError, match=f"{path}:2: .*{said}"):
        read_contrasts(path)


def test_files_that_hold_no_pairs(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "pairs.txt").write_text("x")
    for name, said in (("empty.jsonl", "is empty"), ("pairs.txt", "cannot tell what"), ("no.jsonl", "no such file")):
        with pytest.raises(DataError, match=said):
            read_contrasts(tmp_path / name)
    with pytest.raises(DataError, match="pair 0: a row of named fields"):
        read_contrasts(["x"])


def dialogue(question: str, said: str, label: float, **about) -> Dialogue:
    before = [{"role": "user", "content": f"hi from {said}"}, {"role": "assistant", "content": "hello"}]
    messages = (*before, {"role": "user", "content": question}, {"role": "assistant", "content": said, "name": said})
    return Dialogue(messages, {"pirate": label}, id=said, **about)


def test_pairs_out_of_labelled_dialogues():
    """Answers to one question meet; the context is now one's and now the other's."""
    texts = [
        dialogue("why ?", "arr", 1, domain="sea"),
        dialogue("why ?", "hm", 0, domain="sea"),
        dialogue("why ?", "ahoy", 1, domain="sea"),
        dialogue("why ?", "well", 0, domain="sea"),
        dialogue("why ?", "no", 0, domain="land"),
        dialogue("who ?", "me", 1, domain="sea"),
        "a text without labels",
    ]
    first, second = contrasts_of(texts, "pirate")
    assert [(p.persona_answer, p.other_answer) for p in (first, second)] == [("arr", "hm"), ("ahoy", "well")]
    assert (first.speaker, first.messages[0]["content"]) == ("arr", "hi from arr")
    assert (second.speaker, second.messages[0]["content"]) == ("well", "hi from well")
    assert {(p.question, p.domain) for p in (first, second)} == {("why ?", "sea")}
    with pytest.raises(DataError, match="no question has an answer with 'villain'"):
        contrasts_of(texts, "villain")


def test_splits_keep_questions_together():
    def pair(n: int, split: str = "") -> Contrast:
        return Contrast(persona_answer="a", other_answer="b", prompt=f"question {n}", split=split)

    train, held_out = split_pairs([pair(n) for n in range(40)] * 2)
    assert len(train) + len(held_out) == 80
    assert not {p.question for p in train} & {p.question for p in held_out}
    train, held_out = split_pairs([pair(n, "train" if n < 5 else "held_out") for n in range(10)])
    assert ([p.prompt for p in train], len(held_out)) == ([f"question {n}" for n in range(5)], 5)
    with pytest.raises(DataError, match="4 contrast pairs are in the held_out split"):
        split_pairs([pair(n, "train" if n < 5 else "held_out") for n in range(9)])
