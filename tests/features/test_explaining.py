import pytest

from sae_persona.features.explainers import ExplainerError
from sae_persona.features.explaining import (
    LONGEST,
    ask,
    detect_prompt,
    explain_prompt,
    fuzz_prompt,
    read_explanation,
    read_votes,
)


def test_prompts_are_one_user_message_with_every_text():
    for messages in (
        explain_prompt(["a [[b|9]]", "c"], [" x", "y"]),
        detect_prompt("cats", ["a [[b|9]]", "c"]),
        fuzz_prompt("cats", ["a [[b|9]]", "c"]),
    ):
        (message,) = messages
        assert message["role"] == "user" and "1. a [[b|9]]\n2. c" in message["content"]
    assert '" x", "y"' in explain_prompt(["a"], [" x", "y"])[0]["content"]
    assert "go on with" not in explain_prompt(["a"], [])[0]["content"]
    assert '"cats"' in detect_prompt("cats", ["{braces} are safe"])[0]["content"]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Fires on: words for cats", "words for cats"),
        ("Sure!\n**Fires on:** words\nHope that helps", "words"),
        ("<think>Fires on: no</think>fires on: yes", "yes"),
        ("Fires on: " + "a" * 500, "a" * (LONGEST - 1) + "…"),
        ("Fires on: half \ud800 pair", "half ? pair"),
    ],
)
def test_explanations_are_read(answer, wanted):
    assert read_explanation(answer) == wanted


@pytest.mark.parametrize("answer", ["", "I cannot help", "Fires on:", "Fires on: ...", "<think>Fires on: x", "\ud800"])
def test_rubbish_is_no_explanation(answer):
    with pytest.raises(ExplainerError, match="Fires on"):
        read_explanation(answer)


@pytest.mark.parametrize(
    "answer", ["[1,0,1]", "texts [2]: [1, 0, 1].", "```json\n[1, 0,\n 1]\n```", "[true, false, true]"]
)
def test_votes_are_read(answer):
    assert read_votes(answer, 3) == [True, False, True]


@pytest.mark.parametrize(
    "answer", ["", "1 0 1", "[1, 0]", "[1, 0, 1, 1]", "[1, 0, 7]", "[1, 0, null]", "[[1], 0, 1]", "[1, 0, "]
)
def test_rubbish_is_no_vote(answer):
    with pytest.raises(ExplainerError, match="no list of 3 numbers"):
        read_votes(answer, 3)


def test_what_cannot_be_read_is_asked_for_once_more():
    asked = []

    def complete(messages):
        asked.append(list(messages))
        return "" if len(asked) == 1 else "[1]"

    assert ask(complete, detect_prompt("x", ["a"]), lambda answer: read_votes(answer, 1)) == [True]
    assert [m["role"] for m in asked[1]] == ["user", "assistant", "user"]
    assert asked[1][:1] == asked[0] and asked[1][1]["content"] and "no list of 1 numbers" in asked[1][2]["content"]
    with pytest.raises(ExplainerError):
        ask(lambda messages: "rubbish", detect_prompt("x", ["a"]), lambda answer: read_votes(answer, 1))
