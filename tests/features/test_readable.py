"""Contexts as text, with tokenizers that put spaces into words, and that cut characters into bytes."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sae_persona.activations.lm import load_tokenizer
from sae_persona.features.contexts import TopContexts
from sae_persona.features.firings import Firings, Piece, TokenRows
from sae_persona.features.readable import readable
from sae_persona.types import SparseLatents


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
    by_place = sorted((place, latent) for latent, place in places.items())
    counts = torch.bincount(torch.tensor([place for place, _ in by_place]), minlength=len(ids))
    idx = torch.tensor([latent for _, latent in by_place])
    latents = SparseLatents(idx + 1.0, idx, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
    rows = TokenRows.of([Piece(0, 0, ids, torch.ones(len(ids), dtype=torch.bool))])
    found = TopContexts(n_latents, 2)
    found.update(Firings.of(rows, latents, n_latents))
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
