import numpy as np
import pytest

from sae_persona.errors import ConfigError, DataError
from sae_persona.features import search
from sae_persona.features.descriptions import Description
from sae_persona.features.dictionary import Dictionary, write_dictionary
from sae_persona.features.readable import ContextText
from sae_persona.features.search import find_words, having_words, quoted
from sae_persona.features.stats import LatentStats

TEXTS = [
    ["the ship sailed on", "a parrot spoke"],
    ["ship the parrot home", "the café closed", "what is C++ ?"],
    ["sailors sang", "on a shipment"],
    ["nothing of the kind"],
    [],
]
ABOUT = {
    2: Description(latent=2, explanation="talk of a ship", promoted=((" sea", 1.0),)),
    3: Description(latent=3, promoted=(("sailing", 1.0),), suppressed=((" parrot", -1.0),)),
}


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "search.sqlite"
    contexts = [[ContextText(text, 0, len(text.split()[0]), 1.0) for text in texts] for texts in TEXTS]
    write_dictionary(path, LatentStats(len(TEXTS)), contexts, ABOUT, {})
    return Dictionary.open(path)


@pytest.mark.parametrize(
    ("query", "latents"),
    [
        ("ship", {0, 1, 2}),
        ("parrot", {0, 1, 3}),
        ("ship parrot", {0, 1}),
        ("ship OR kind", {0, 1, 2, 3}),
        ("the NOT parrot", set()),
        ("on NOT parrot", {2}),
        ('"ship sailed"', {0}),
        ('"on a parrot"', set()),  # from one context into the next
        ("sail*", {0, 2, 3}),
        ("shipm*", {2}),
        ("CAFE", {1}),
        ("tokens: ship", {1}),
        ("contexts: ship", {0, 1}),
        ("explanation: ship", {2}),
        ("{promoted suppressed}: parrot", {3}),
        ("NEAR(the home)", {1}),
        ("zebra", set()),
    ],
)
def test_words_find_what_has_them(dictionary, query, latents):
    found = find_words(dictionary, query, 10)
    assert set(found.latents.tolist()) == latents
    assert len(found.latents) == len(latents)
    assert set(np.flatnonzero(having_words(dictionary, query)).tolist()) == latents
    assert not found.cut
    for limit in (1, 2):
        assert find_words(dictionary, query, limit).latents.tolist() == found.latents[:limit].tolist()


def test_what_is_said_of_a_latent_outranks_what_stands_around(dictionary):
    assert find_words(dictionary, "ship", 9).latents.tolist()[2:] == [0]
    assert find_words(dictionary, "parrot", 9).latents.tolist()[0] == 3


def test_only_allowed_ones(dictionary):
    allowed = np.array([True, False, False, True, True])
    assert find_words(dictionary, "ship OR kind", 9, allowed).latents.tolist() in ([0, 3], [3, 0])
    assert set(find_words(dictionary, "ship", 9, ~allowed).latents.tolist()) == {1, 2}


def test_of_too_many_the_first_are_put_in_order(dictionary, monkeypatch):
    monkeypatch.setattr(search, "RANKED", 2)
    found = find_words(dictionary, "contexts: the", 9)
    assert found.cut
    assert set(found.latents.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("ship AND", "syntax error at its end"),
        ('"ship', "unterminated string"),
        ("captain: ship", "captain is not a column; columns are explanation, promoted"),
        ("what?", 'syntax error near "\\?"'),
        ("(ship", "syntax error at its end"),
        ("*", "an asterisk stands after"),
        ("a - b", "b is not a column"),
        ("c++", "syntax error"),
    ],
)
def test_a_query_that_does_not_parse_says_where_and_how_it_could(dictionary, query, said):
    for ask in (lambda: find_words(dictionary, query, 3), lambda: having_words(dictionary, query)):
        with pytest.raises(DataError, match=said) as told:
            ask()
        assert quoted(query) in str(told.value)
        assert "\n" not in str(told.value)
    find_words(dictionary, quoted(query), 3)


def test_plain_words_are_found_signs_and_all(dictionary):
    assert find_words(dictionary, quoted("what is C++ ?"), 3).latents.tolist() == [1]
    assert quoted('say "arr"') == '"say" """arr"""'


def test_an_empty_query(dictionary):
    with pytest.raises(ConfigError, match="nothing to search for"):
        find_words(dictionary, " ", 3)
