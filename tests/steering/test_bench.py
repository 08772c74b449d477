"""Development and test questions that are apart."""

import pytest

from sae_persona.errors import DataError
from sae_persona.steering.bench import check_apart, halves


def test_a_question_is_the_same_in_other_letters_and_spaces():
    check_apart(["who are you ?", "why ?"], ["what are you ?"])
    with pytest.raises(
        DataError, match=r'^1 question is in the development and the test set, the first "who are you \?"'
    ):
        check_apart(["Who are  YOU ?", "why ?"], [" who are you ?\n", "WHO are you ?"])
    with pytest.raises(DataError, match="^2 questions are in .*: take them out of one$"):
        check_apart(["a", "b", "straße"], ["STRASSE", "B"])


def test_halves_share_no_question():
    chats = [[{"role": "user", "content": text}] for text in ("a", "b", "A ", "c", "a", "B")]
    one, other = ({chat[0]["content"].strip().lower() for chat in half} for half in halves(chats))
    assert (one, other) == ({"a", "c"}, {"b"})
    assert sum(map(len, halves(chats))) == len(chats)
