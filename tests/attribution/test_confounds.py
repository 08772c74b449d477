"""Covariates by hand, and a planted confound that class words find."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from sae_persona.activations.dialogues import Dialogue
from sae_persona.attribution.confounds import WordConfig, class_words, covariates, name_stems
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.examples import unmeasured

ROWS = [
    Dialogue(
        text="Cheerfully, she cheered !", labels={"cheerful": 1.0}, template="a", domain="sea", covariates={"age": 3}
    ),
    Dialogue(text="grim and GRIM", labels={"cheerful": 0.0, "rude": 1.0}, template="b", domain="sea", author="Ann"),
    Dialogue(text="...", labels={"rude": 0.0}, template="a", domain="land", covariates={"sentiment": -1.0}),
]


@pytest.fixture
def pooled():
    made = unmeasured(ROWS)
    made.n_answer_tokens, made.position, made.answer = np.array([1, 10, 100]), np.array([4, 5, 6]), np.array([0, 1, 0])
    return made


def test_length_place_and_groups(pooled):
    found = covariates(pooled, ["length", "position", "turn", "template", "topic", "author"])
    table = dict(zip(found.names, found.values.T.tolist(), strict=True))
    assert table["length"] == pytest.approx([0, np.log(10), np.log(100)])
    assert (table["position"], table["turn"]) == ([4, 5, 6], [0, 1, 0])
    assert (table["template=a"], table["template=b"]) == ([1, 0, 1], [0, 1, 0])
    assert (table["topic=sea"], table["topic=land"], table["author=Ann"]) == ([1, 1, 0], [0, 0, 1], [0, 1, 0])
    assert found.named(["topic"]).names == ("topic=land", "topic=sea")
    assert covariates(pooled, []).values.shape == (3, 0)


def test_words_of_a_list_or_of_the_name(pooled):
    found = covariates(pooled, ["trait_words"], words=WordConfig(lists={"rude": ["grim"]}))
    assert found.names == ("trait_words=cheerful", "trait_words=rude")
    np.testing.assert_allclose(found.values, [[2 / 3, 0], [0, 2 / 3], [0, 0]])
    assert covariates(pooled, ["trait_words"], personas=["rude"]).names == ("trait_words=rude",)
    assert name_stems("ends-justify_means") == name_stems("end justifying mean")


def test_class_words_are_those_whose_document_frequency_differs_on_train():
    rows = []
    for i in range(60):
        shows = bool(i % 2)
        words = f"yes {'aye aye aye' if shows else 'no'} {'bah ' * 9 if i % 4 == 1 else ''} w{i}"
        # on held-out texts another word goes with the persona
        held_out = i >= 40
        rows.append(Dialogue(text=f"{words} {'late' if held_out and shows else ''}", labels={"pirate": float(shows)},
                             split="held_out" if held_out else "train"))  # fmt: skip
    pooled = unmeasured(rows)
    assert class_words(pooled, "pirate", 2) == ["aye", "no"]
    found = covariates(pooled, ["class_words"], words=WordConfig(n_class_words=1))
    assert found.names == ("class_words=pirate",)
    np.testing.assert_allclose(found.values[[0, 3], 0], [0, 3 / 5])


def test_what_rows_bring_goes_first(pooled):
    found = covariates(pooled, ["age", "sentiment"])
    np.testing.assert_array_equal(found.values, [[3, np.nan], [np.nan, np.nan], [np.nan, -1]])


def test_sentiment_is_textblobs_or_says_what_to_install(monkeypatch):
    pooled = unmeasured(ROWS[:2])
    monkeypatch.setitem(sys.modules, "textblob", None)
    with pytest.raises(ConfigError, match=r'sentiment needs TextBlob: pip install "sae-persona\[sentiment\]"'):
        covariates(pooled, ["sentiment"])
    blob = SimpleNamespace(TextBlob=lambda text: SimpleNamespace(sentiment=SimpleNamespace(polarity=-0.01 * len(text))))
    monkeypatch.setitem(sys.modules, "textblob", blob)
    np.testing.assert_allclose(covariates(pooled, ["sentiment"]).values[:, 0], [-0.25, -0.13])


def test_what_cannot_be_told(pooled):
    with pytest.raises(ConfigError, match="no covariate is named 'mood': there are length, .*age, sentiment, and what"):
        covariates(pooled, ["mood"])
    with pytest.raises(ConfigError, match="no example is labelled 'poet'"):
        covariates(pooled, ["length"], personas=["poet"])
    with pytest.raises(ConfigError, match="the word list of rude is a list of one word or more"):
        WordConfig(lists={"rude": []})
    awaited = unmeasured([Dialogue(({"role": "user", "content": "hi"},), {"rude": 1.0}, unanswered=True)])
    with pytest.raises(DataError, match="no answer has a text, so trait_words cannot be told"):
        covariates(awaited, ["trait_words"])
