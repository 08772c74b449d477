import math

import pytest
import torch

from sae_persona.errors import FormatError
from sae_persona.features.descriptions import Description
from sae_persona.features.dictionary import Dictionary, write_dictionary
from sae_persona.features.readable import ContextText
from sae_persona.features.stats import LatentStats
from sae_persona.types import SparseLatents


def context(text, token, strength=1.0):
    start = text.index(token)
    return ContextText(text, start, start + len(token), strength)


def stats():
    found = LatentStats(3)
    found.update(SparseLatents(torch.tensor([[2.0], [3.0], [1.0], [1.0]]), torch.tensor([[0], [0], [1], [1]])))
    return found


@pytest.fixture
def dictionary(tmp_path):
    contexts = [
        [context("a sailor said arr to me", "arr", 3.0), context("arr\nmatey, a ship", "ship", 2.0)],
        [context("a plain\x01 word \ue000 here", "word")],
        [],
    ]
    about = {
        0: Description(
            latent=0, promoted=((" arr", 2.0), (" ship", 1.0)), suppressed=((" sir", -1.0),), explanation="pirates"
        )
    }
    path = tmp_path / "search.sqlite"
    write_dictionary(path, stats(), contexts, about, {"latents": {"size": 1}})
    return Dictionary.open(path)


def test_what_was_written_is_read(dictionary):
    assert dictionary.n_latents == 3
    assert dictionary.facts["n_tokens"] == 4
    assert dictionary.facts["inputs"] == {"latents": {"size": 1}}
    numbers = dictionary.numbers
    assert numbers["firing_rate"].tolist() == [0.5, 0.5, 0]
    assert numbers["maximum"].tolist() == [3, 1, 0]
    assert math.isnan(numbers["p999"][2])
    second, first, third = dictionary.entries([1, 0, 2])
    assert (first.explanation, first.promoted, first.suppressed, first.tokens) == (
        "pirates",
        "arr · ship",
        "sir",
        "arr · ship",
    )
    assert [c.strength for c in first.contexts] == [3, 2]
    assert second.contexts[0].token == "word"
    assert third.contexts == ()


def test_contexts_that_answer_the_query_come_first_with_the_firing_token_marked(dictionary):
    (entry,) = dictionary.entries([0], "matey")
    assert entry.contexts[0].marked(40) == "arr⏎matey, a [ship]"
    assert entry.contexts[1].marked(5) == "…said [arr] to m…"
    (entry,) = dictionary.entries([0], "zebra")
    assert entry.contexts[0].token == "arr"


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0 and no more", b"text"])
def test_what_is_no_dictionary_is_refused(tmp_path, content):
    path = tmp_path / "search.sqlite"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="is not a feature dictionary"):
        Dictionary.open(path)
    with pytest.raises(FormatError, match="is not a feature dictionary"):
        Dictionary.open(tmp_path / "none.sqlite")
