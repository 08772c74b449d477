import pytest

from sae_persona.activations.dialogues import Dialogue, prompt_tokens, tokenize
from sae_persona.errors import DataError, ModelError

MESSAGES = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " ahoy ", "labels": {"pirate": 1}},
    {"role": "user", "content": "bye", "name": "ann"},
    {"role": "assistant", "content": "farewell"},
)
CHAT = Dialogue(MESSAGES, {"pirate": 0.0})
RENDERED = "<user>hi\n<assistant>ahoy\n<ann>bye\n<assistant>farewell\n"


def words(lm, ids):
    return lm.tokenizer.decode(ids)


def test_answers_carry_their_labels_and_the_token_before_them(lm):
    tokens = tokenize(lm, CHAT)
    assert words(lm, tokens.ids) == "<s>" + RENDERED
    first, last = tokens.answers
    assert words(lm, tokens.ids[first.start : first.stop]) == "ahoy"
    assert words(lm, tokens.ids[last.start : last.stop]) == "farewell"
    assert first.labels == {"pirate": 1} and last.labels == {"pirate": 0}
    for answer in (first, last):
        assert answer.pre == answer.start - 1
        assert words(lm, tokens.ids[: answer.start]).endswith("<assistant>")


def test_labels_of_a_dialogue_are_those_of_its_last_answer(lm):
    unmarked = tuple({k: v for k, v in m.items() if k != "labels"} for m in MESSAGES)
    first, last = tokenize(lm, Dialogue(unmarked, {"pirate": 0.0})).answers
    assert first.labels is None and last.labels == {"pirate": 0.0}


def test_prompt_tokens_are_what_precedes_the_answer(lm):
    tokens = tokenize(lm, CHAT)
    for answer, i in zip(tokens.answers, (1, 3), strict=True):
        assert prompt_tokens(lm, MESSAGES[:i]) == tokens.ids[: answer.start]


def test_a_named_speaker_is_named_in_the_prompt(make_lm):
    template = (
        "{% for m in messages %}<{{ m['name'] if 'name' in m else m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<{{ assistant_name or 'assistant' }}>{% endif %}"
    )
    lm = make_lm(template=template)
    messages = (MESSAGES[0], {"role": "assistant", "content": "ahoy", "name": "ann"})
    (answer,) = (tokens := tokenize(lm, Dialogue(messages))).answers
    assert words(lm, tokens.ids[: answer.start]) == "<s><user>hi<ann>"
    assert prompt_tokens(lm, messages[:1], speaker="ann") == tokens.ids[: answer.start]
    assert words(lm, prompt_tokens(lm, messages[:1])) == "<s><user>hi<assistant>"


def test_bos_as_for_plain_text_and_never_twice(make_lm):
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for lm in (make_lm(), make_lm(template=plain)):
        for ids in (tokenize(lm, CHAT).ids, tokenize(lm, "hi").ids, prompt_tokens(lm, MESSAGES)):
            assert ids[0] == 1 and 1 not in ids[1:]
    assert 1 not in tokenize(make_lm(bos=False, template=plain), CHAT).ids


def test_spans_stand_when_characters_are_dropped_or_take_many_tokens(make_lm):
    from tokenizers import normalizers

    lm = make_lm()
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("#", ""), normalizers.Lowercase()]
    )
    messages = ({"role": "user", "content": "##é"}, {"role": "assistant", "content": "#AHÖY#"})
    (answer,) = (tokens := tokenize(lm, Dialogue(messages))).answers
    assert words(lm, tokens.ids[answer.start : answer.stop]) == "ahöy"
    assert words(lm, tokens.ids[: answer.start]).endswith("é\n<assistant>")
    dropped = tokenize(lm, Dialogue((messages[0], {"role": "assistant", "content": "##"})))
    assert dropped.answers == ()


def test_a_template_that_adds_to_the_last_answer_only(make_lm):
    thinking = (
        "{% for m in messages %}[{{ m['role'] }}]{% if loop.last and m['role'] == 'assistant' %}(thinks){% endif %}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    lm = make_lm(template=thinking)
    tokens = tokenize(lm, CHAT)
    assert [words(lm, tokens.ids[a.start : a.stop]) for a in tokens.answers] == [" ahoy", "(thinks)farewell"]


def test_truncation_drops_what_begins_beyond_it(lm):
    whole = tokenize(lm, CHAT)
    first, last = whole.answers
    cut = tokenize(lm, CHAT, context_size=last.start)
    assert cut.ids == whole.ids[: last.start]
    assert [answer.start for answer in cut.answers] == [first.start]
    (answer,) = tokenize(lm, CHAT, context_size=first.start + 2).answers
    assert (answer.start, answer.stop) == (first.start, first.start + 2)


def test_a_plain_text_is_one_answer_read_at_its_end(make_lm):
    tokens = tokenize(make_lm(), Dialogue(text="hello", labels={"pirate": 1.0}))
    (answer,) = tokens.answers
    assert (answer.start, answer.stop, answer.pre, answer.labels) == (1, 6, 5, {"pirate": 1.0})
    (answer,) = tokenize(make_lm(bos=False), Dialogue(text="hello"), context_size=3).answers
    assert (answer.start, answer.stop, answer.pre) == (0, 3, 2)
    assert tokenize(make_lm(), Dialogue(text="")).answers == ()
    assert tokenize(make_lm(), "hello").answers == ()


def test_an_answer_that_opens_the_dialogue_is_left_out(lm):
    assert tokenize(lm, Dialogue(MESSAGES[1:2])).answers == ()


def test_templates_that_cannot_be_followed(make_lm):
    with pytest.raises(ModelError, match="tiny-Llama has no chat template"):
        tokenize(make_lm(template=None), CHAT)
    with pytest.raises(DataError, match="refuses a dialogue: turns must alternate"):
        tokenize(make_lm(template="{{ raise_exception('turns must alternate') }}"), CHAT)
    backwards = "{% for m in messages | reverse %}{{ m['role'] + m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="dialogue 7: the chat template of tiny-Llama rewrites message 1"):
        tokenize(make_lm(template=backwards), Dialogue(MESSAGES, id="7"))
    shouting = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(DataError, match="rewrites message 1"):
        tokenize(make_lm(template=shouting), CHAT)


def test_a_tokenizer_without_offsets(lm):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="has a slow tokenizer, which cannot mark answers"):
        tokenize(type(lm)(lm.model, Slow(), lm.blocks, lm.blocks_path, lm.name), CHAT)


def test_rows(lm):
    row = {"messages": list(MESSAGES), "labels": {"pirate": True, "poet": None}, "split": "train", "id": 3}
    dialogue = Dialogue.from_row({**row, "domain": None, "other": 1}, "here:1")
    assert dialogue.labels == {"pirate": 1.0}
    assert (dialogue.split, dialogue.id, dialogue.domain, dialogue.text) == ("train", "3", "", None)
    plain = Dialogue.from_row({"text": "hello", "labels": {"pirate": 0}}, "here:2")
    assert (plain.messages, plain.text, plain.labels) == ((), "hello", {"pirate": 0.0})
    # a table's columns leave None where another row has a value
    sparse = [{**m, "labels": None, "name": None} for m in MESSAGES]
    assert all(set(m) == {"role", "content"} for m in Dialogue.from_row({"messages": sparse}, "here:3").messages)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "needs messages, or a text, got nothing"),
        ({"messages": []}, "needs messages, or a text"),
        ({"messages": "hi"}, "messages is a list of role and content, got str"),
        ({"messages": [{"role": "user"}]}, "a message needs a role and a content"),
        ({"messages": [{"role": "user", "content": 3}]}, "a message needs a role and a content"),
        ({"messages": MESSAGES, "labels": "pirate"}, "labels read {"),
        ({"messages": MESSAGES, "labels": {"pirate": "yes"}}, "labels read {"),
        ({"messages": MESSAGES[:1], "labels": {"pirate": 1}}, "no message has the role assistant"),
        ({"text": "hi", "split": "test"}, "split is train or held_out, or left out, got 'test'"),
    ],
)
def test_rows_that_are_not_right(row, message):
    with pytest.raises(DataError, match=f"^here:1: .*{message}"):
        Dialogue.from_row(row, "here:1")
