"""Contexts as text, with tokenizers that put spaces into words, and that cut characters into bytes."""

import numpy as np
import pytest
import transformers
from scipy import sparse
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sae_persona.activations.lm import load_tokenizer
from sae_persona.features.contexts import TopContexts
from sae_persona.features.readable import readable


@pytest.fixture(scope="module")
def letters():
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)


def contexts_of(ids, places, n_latents=3):
    """Latent i fires at places[i] of one document, with strength i + 1."""
    acts = np.zeros((len(ids), n_latents), np.float32)
    for latent, place in places.items():
        acts[place, latent] = latent + 1
    found = TopContexts(n_latents, 2)
    found.update([(0, ids)], sparse.csr_matrix(acts))
    return found


def test_words(letters):
    tokenizer = load_tokenizer("lab")
    ids = tokenizer("what should i take for fever ?").input_ids
    first, none, last = readable(contexts_of(ids, {0: 0, 2: 5}), tokenizer)
    assert (first[0].text, first[0].token) == ("what should i take for fever ?", "what")
    assert none == []
    assert (last[0].token, last[0].strength) == ("fever", 3)
    assert last[0].marked(8) == "…ake for [fever] ?"


@pytest.mark.parametrize("place", [1, 2], ids=["first byte", "last byte"])
def test_a_character_of_several_tokens_is_whole(letters, place):
    ids = letters("xéy").input_ids
    assert len(ids) == 4
    (shown,), _, _ = readable(contexts_of(ids, {0: place}), letters)
    assert (shown.text, shown.token) == ("xéy", "é")


def test_many_latents_come_in_order(letters, monkeypatch):
    monkeypatch.setattr("sae_persona.features.readable.AT_ONCE", 4)
    found = list(readable(contexts_of(letters("abcdefg").input_ids, {i: i for i in (0, 1, 3, 6)}, 8), letters))
    assert [[shown.token for shown in one] for one in found] == [["a"], ["b"], [], ["d"], [], [], ["g"], []]
