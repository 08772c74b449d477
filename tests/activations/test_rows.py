"""Marks, spans and weights of a row, and rubbish in their place."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_persona.activations.dialogues import Dialogue, tokenize
from sae_persona.activations.rows import read_labels, read_weights
from sae_persona.errors import DataError, ModelError

SPANS = [{"start": 9, "stop": 14, "labels": {"rude": 1}}, {"start": 0, "stop": 4, "labels": {"rude": 0}, "hard": True}]


def said(lm, tokens, answer):
    return lm.tokenizer.decode(tokens.ids[answer.start : answer.stop])


def test_a_span_of_a_text_has_its_own_tokens_and_the_one_before_them(lm):
    row = {"text": "well met, fool", "labels": {"pirate": 1}, "spans": [*SPANS, {**SPANS[0], "start": 5, "stop": 8}]}
    tokens = tokenize(lm, Dialogue.from_row(row, "here"))
    whole, met, fool = tokens.answers  # "well" opens the text: only BOS stands before it
    assert [said(lm, tokens, part) for part in tokens.answers] == ["well met, fool", "met", " fool"]
    assert (whole.pre, met.pre, fool.pre) == (len(tokens.ids) - 1, met.start - 1, fool.start - 1)
    assert whole.labels == {"pirate": 1} and fool.labels == {"rude": 1}
    assert (fool.mark.name, fool.mark.text, fool.mark.hard) == ("0[9:14]", " fool", False)


def test_spans_of_a_message_are_counted_in_it_as_it_was_written(lm):
    answer = {"role": "assistant", "content": "  ahoy, é fool", "spans": [{"start": 6, "stop": 9, "labels": {"a": 1}}]}
    messages = [{"role": "user", "content": "hi"}, {**answer, "weights": {"b": 0.5}, "labels": {"b": 1}}]
    messages += [{"role": "user", "content": "?"}, {"role": "assistant", "content": "no"}]
    dialogue = Dialogue.from_row({"messages": messages, "labels": {"b": 0}, "hard": 1}, "here")
    tokens = tokenize(lm, dialogue)
    assert [said(lm, tokens, part) for part in tokens.answers] == ["ahoy, é fool", ", é", "no"]
    assert [part.mark.name for part in tokens.answers] == ["0", "0[6:9]", "1"]
    assert [part.labels for part in tokens.answers] == [{"b": 1}, {"a": 1}, {"b": 0}]
    assert [part.mark.weights for part in tokens.answers] == [{"b": 0.5}, None, None]
    assert all(part.mark.hard for part in tokens.answers)
    blank = {**answer, "spans": [{"start": 0, "stop": 2, "labels": {"a": 1}}]}
    assert len(tokenize(lm, Dialogue.from_row({"messages": [messages[0], blank]}, "here")).answers) == 1


def test_a_span_that_begins_beyond_the_context_is_cut_away(lm):
    dialogue = Dialogue.from_row({"text": "well met, fool", "spans": SPANS[:1]}, "here")
    assert len(tokenize(lm, dialogue, context_size=9).answers) == 1
    _, span = tokenize(lm, dialogue, context_size=12).answers
    assert (span.start, span.stop) == (10, 12)


def test_an_awaited_answer_is_the_token_before_it(lm):
    row = {"messages": [{"role": "user", "content": "hi"}], "labels": {"pirate": 1}, "unanswered": True}
    tokens = tokenize(lm, Dialogue.from_row(row, "here"))
    (answer,) = tokens.answers
    assert lm.tokenizer.decode(tokens.ids).endswith("<user>hi\n<assistant>")
    assert (answer.start, answer.stop, answer.pre) == (len(tokens.ids) - 1, len(tokens.ids), len(tokens.ids) - 1)
    assert (answer.labels, answer.mark.text, answer.mark.name) == ({"pirate": 1}, "", "0")


def test_labels_of_an_awaited_answer_are_not_those_of_the_answer_before(lm):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    row = {"messages": [*messages, messages[0]], "labels": {"pirate": 1}, "unanswered": True}
    assert [part.labels for part in tokenize(lm, Dialogue.from_row(row, "here")).answers] == [None, {"pirate": 1}]


def test_spans_need_a_tokenizer_that_knows_characters(lm):
    class Slow:
        is_fast = False

    slow = type(lm)(lm.model, Slow(), lm.blocks, lm.blocks_path, lm.name)
    with pytest.raises(ModelError, match="slow tokenizer"):
        tokenize(slow, Dialogue.from_row({"text": "well met, fool", "spans": SPANS}, "here"))


def test_missing_labels_and_one_confidence_for_all():
    dialogue = Dialogue.from_row(
        {"text": "a", "labels": {"x": float("nan"), "y": 1, "z": None}, "weights": 0.5}, "here"
    )
    assert dialogue.labels == {"y": 1.0} and dialogue.weights == {"y": 0.5}
    assert read_weights({"x": None}, {"x": 1.0}, "here") == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weights": {"pirate": 2}}, "a weight is a confidence between 0 and 1, got 2.0"),
        ({"weights": {"poet": 1}}, "weights name poet, which the row does not label"),
        ({"labels": {"pirate": float("inf")}}, "labels read"),
        ({"labels": {"pirate": 10**400}}, "labels read"),
        ({"covariates": {"x": "long"}}, "covariates read"),
        ({"hard": "very"}, "hard is true or false, got 'very'"),
        ({"spans": "all"}, "spans is a list of start, stop and labels, got str"),
        ({"spans": [{"start": 0, "stop": 9, "labels": {"a": 1}}]}, "span 0 to 9 is not inside the text, which has 5"),
        ({"spans": [{"start": 0, "stop": True, "labels": {"a": 1}}]}, "a span reads"),
        ({"spans": [{"start": 0, "stop": 2}]}, "a span reads"),
        ({"spans": [{"start": 0, "stop": 2, "labels": {}}]}, "span 0 to 2 has no labels"),
        ({"spans": [{"start": 0, "stop": 2, "labels": {"a": 1}}] * 2}, "span 0 to 2 stands twice"),
        ({"unanswered": True}, "unanswered needs messages"),
        ({"messages": [{"role": "user", "content": "hi", "labels": {"a": 1}}]}, "labels belong to answers"),
    ],
)
def test_what_is_wrong_with_a_row(more, message):
    with pytest.raises(DataError, match=f"^here:1: .*{message}"):
        Dialogue.from_row({"text": "hello", "labels": {"pirate": 1}, **more}, "here:1")


names = st.text(max_size=6)
marks = st.dictionaries(names, st.one_of(st.floats(0, 1), st.booleans()), max_size=3)
spans = st.lists(
    st.builds(lambda a, n, labels: {"start": a, "stop": a + n, "labels": labels}, st.integers(0, 3), st.integers(1, 3),
              st.dictionaries(names, st.floats(0, 1), min_size=1, max_size=2)),
    max_size=2, unique_by=lambda span: (span["start"], span["stop"]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=6, max_size=20), marks, spans, st.sampled_from(["", "train", "held_out"]), st.booleans(), marks)
def test_a_row_is_what_it_was_read_from(text, labels, spans, split, hard, covariates):
    answer = {"role": "assistant", "content": text, "labels": labels, "spans": spans}
    about = {"split": split, "hard": hard, "covariates": covariates, "id": "é"}
    chat = [{"role": "user", "content": "hi"}, answer]
    for row in ({"text": text, "labels": labels, "spans": spans}, {"messages": chat, "labels": labels}):
        made = Dialogue.from_row({**row, **about}, "here").to_row()
        assert Dialogue.from_row(json.loads(json.dumps(made)), "here").to_row() == made
    plain = Dialogue.from_row({"text": text, "labels": labels, "spans": spans, **about}, "here")
    assert [(mark.text, mark.hard) for mark in plain.marks()][1:] == [
        (text[span["start"] : span["stop"]], hard) for span in sorted(spans, key=lambda s: (s["start"], s["stop"]))
    ]


rubbish = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["labels", "weights", "spans", "start", "stop", "role", "content", "hard", "x"]), inner
        )
    ),
    max_leaves=8,
)
keys = st.sampled_from(
    ["text", "messages", "labels", "weights", "spans", "hard", "covariates", "unanswered", "split", "id"]
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(keys, rubbish))
def test_rubbish_is_a_dialogue_or_one_line_that_says_where(row):
    try:
        assert isinstance(Dialogue.from_row(row, "here:7"), Dialogue)
    except DataError as error:
        assert str(error).startswith("here:7: ") and "\n" not in str(error)


@pytest.mark.parametrize("odd", [-1, 1.01, 5])
def test_a_label_beyond_0_and_1_is_refused_with_its_persona_and_row(odd):
    with pytest.raises(DataError, match=rf"row 3: the label of 'pirate' is {odd:g}, a label lies between 0 .* and 1"):
        read_labels({"kind": 0.5, "pirate": odd}, "row 3")
    assert read_labels({"kind": 0.5, "pirate": 1, "rude": 0}, "row 3") == {"kind": 0.5, "pirate": 1, "rude": 0}
