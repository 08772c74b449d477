"""Which texts are shown, how they are marked, and that silent texts are silent."""

import numpy as np
import pytest
import torch

from sae_persona.activations.hooks import read
from sae_persona.features.contexts import Context
from sae_persona.features.samples import SilentTexts, plain, split, with_activations, with_marks
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import TopK
from sae_persona.types import HookPoint

HOOK = HookPoint(1)


@pytest.fixture
def lm(make_tiny_lm):
    return make_tiny_lm()


def context(lm, text, acts, document=0):
    ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    return Context(document, 0, ids, [acts.get(i, 0.0) for i in range(len(ids))])


def test_halves_share_no_context_and_both_hold_strong_ones():
    contexts = [Context(i, 0, [1], [9.0 - i]) for i in range(7)]
    shown, held_out = split(contexts)
    assert [c.document for c in shown] == [0, 2, 4, 6] and [c.document for c in held_out] == [1, 3, 5]


def test_marks_are_where_it_fires_strongly(lm):
    found = context(lm, "abcd e", {0: 9.0, 1: 0.4, 2: 4.0, 5: 3.0})
    assert with_activations(lm.tokenizer, found, 18.0) == "[[a|4]]b[[c|2]]d [[e|2]]"
    assert with_activations(lm.tokenizer, found, 1.0) == "[[a|9]]b[[c|9]]d [[e|9]]"
    assert plain(lm.tokenizer, found.tokens) == "abcd e"
    assert with_marks(lm.tokenizer, found, np.random.default_rng(0), right=True) == "[[a]]b[[c]]d [[e]]"


def test_wrong_marks_are_as_many_and_all_on_silent_tokens(lm):
    found = context(lm, "abcdefgh", {0: 9.0, 1: 0.4, 2: 4.0})
    for seed in range(20):
        text = with_marks(lm.tokenizer, found, np.random.default_rng(seed), right=False)
        assert text.count("[[") == 2
        assert not any(f"[[{letter}]]" in text for letter in "abc")
    everywhere = context(lm, "ab", {0: 1.0, 1: 1.0})
    assert with_marks(lm.tokenizer, everywhere, np.random.default_rng(0), right=False) is None
    few = context(lm, "abc", {0: 1.0, 1: 1.0})
    assert with_marks(lm.tokenizer, few, np.random.default_rng(0), right=False) == "ab[[c]]"


@torch.no_grad()
def test_silent_texts_do_not_activate_the_latent(lm, tiny_sae):
    """Of every latent, read again one text at a time by the dense rule."""
    texts = ["hello there", "abc", "the cat sat on", "zzz yyy", "of all the", "1234567"]
    own = [context(lm, text, {0: 1.0}, document=i) for i, text in enumerate(texts)]
    sae = SAE(tiny_sae.w_enc, tiny_sae.b_enc, tiny_sae.w_dec, tiny_sae.b_dec, TopK(1))
    silent, found_any = SilentTexts(lm, sae, HOOK, own, batch=4), 0
    for latent in range(tiny_sae.n_latents):
        mine = [own[0], own[1]]
        for tokens, wanted in zip(silent.of(latent, mine, np.random.default_rng(0)), mine, strict=False):
            ids = torch.tensor([[lm.bos_id, *tokens]])
            x = read(lm, [HOOK], ids, torch.ones_like(ids))[HOOK][0, 1:]
            assert (sae.encode(x).dense(sae.n_latents)[:, latent] <= 1e-6).all()
            assert not any(tokens == other.tokens[: len(tokens)] for other in mine)
            assert len(tokens) <= len(wanted.tokens)
            found_any += 1
    assert found_any > 10


def test_silent_texts_are_as_long_where_there_are_such(lm, tiny_sae):
    own = [context(lm, "ab" * n, {0: 1.0}, document=n) for n in (1, 3, 6)]
    silent = SilentTexts(lm, tiny_sae, HOOK, own)
    silent._firing = [set(), set(), set()]
    asked = [context(lm, "xyxyx", {0: 1.0}, document=50)]
    for seed in range(5):
        assert len(silent.of(3, asked, np.random.default_rng(seed))[0]) == 5
    silent._firing = [{3}, {3}, {3}]
    assert silent.of(3, asked, np.random.default_rng(0)) == []
