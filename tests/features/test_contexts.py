"""Top and sampled contexts: against a loop over every firing."""

import h5py
import numpy as np
import pytest
import torch

from sae_persona.errors import DataError
from sae_persona.features.contexts import WINDOW, SampledContexts, TopContexts
from sae_persona.features.firings import POSITION_BITS, chance

N_LATENTS, KEPT = 6, 3
KINDS = [TopContexts, SampledContexts]


def kept(kind, *corpora):
    contexts = kind(N_LATENTS, KEPT)
    for corpus in corpora:
        contexts.update(corpus.firings)
    return contexts


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.PARTS)


def strongest(entries):
    """The first of the corpus of the strongest of each document, strongest first."""
    best = {}
    for entry in sorted(entries, key=lambda e: (-e[3], e[1:3])):
        best.setdefault(entry[1], entry)
    return list(best.values())


def drawn(entries):
    def number(entry):
        return int(chance(torch.tensor([entry[1] << POSITION_BITS | entry[2]]), entry[0])[0])

    return sorted(entries, key=number)


@pytest.mark.parametrize(("kind", "ordered"), [(TopContexts, strongest), (SampledContexts, drawn)])
def test_keeps_the_first_in_order_with_what_is_around_them(make_corpus, kind, ordered):
    corpus = make_corpus(0)
    contexts, entries = kept(kind, corpus), list(corpus.entries())
    acts = {(id(piece), latent, at): act for latent, _, _, act, piece, at in entries}
    for latent in range(N_LATENTS):
        wanted = ordered([entry for entry in entries if entry[0] == latent])[:KEPT]
        found = contexts.of(latent)
        assert len(found) == len(wanted)
        for context, (_, document, position, act, piece, at) in zip(found, wanted, strict=True):
            assert (context.document, context.position, context.strength) == (document, position, act)
            window = range(max(at - WINDOW, 0), min(at + WINDOW + 1, len(piece.ids)))
            assert context.tokens == [piece.ids[i] for i in window]
            assert context.acts == [acts.get((id(piece), latent, i), 0.0) for i in window]
            assert context.at is not None and window[context.at] == at


@pytest.mark.parametrize("kind", KINDS)
def test_parts_in_any_order_are_one_pass(make_corpus, kind):
    corpus = make_corpus(1, n=40)
    whole = kept(kind, corpus)
    assert same(kept(kind, corpus.part(11), corpus.part(0, 11)), whole)
    assert same(kept(kind, *(corpus.part(i, i + 1) for i in range(len(corpus.pieces)))), whole)
    # every other piece, so that texts in two pieces are in both halves
    one, other = kept(kind, corpus.part(0, every=2)), kept(kind, corpus.part(1, every=2))
    both = kept(kind, corpus.part(0, every=2))
    both.merge(other)
    assert same(both, whole)
    other.merge(one)
    assert same(other, whole)


def test_the_sample_is_uniform_over_firings():
    """Of 4000 latents that fire on 50 tokens each, every token is kept about as often."""
    n_latents, n = 4000, 50
    latents = torch.arange(n_latents).repeat_interleave(n)
    contexts = SampledContexts(n_latents, 5)
    place = torch.arange(n).repeat(n_latents) << POSITION_BITS
    first = contexts._first(latents, place, torch.ones(len(place)))
    counts = torch.bincount(place[first] >> POSITION_BITS, minlength=n).double()
    expected = n_latents * 5 / n
    assert len(first) == n_latents * 5
    assert float(((counts - expected) ** 2 / expected).sum()) < 90  # chi squared of 49 degrees: 1 in 3000


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_fires_nothing_is_kept(make_corpus, kind):
    corpus = make_corpus(6)
    silent = type(corpus)(corpus.pieces, corpus.dense * 0)
    assert same(kept(kind, silent), kind(N_LATENTS, KEPT))
    assert kept(kind, corpus).of(0) == []


@pytest.mark.parametrize("kind", KINDS)
def test_goes_through_a_file(make_corpus, tmp_path, kind):
    contexts = kept(kind, make_corpus(4))
    with h5py.File(tmp_path / "c.h5", "w") as file:
        contexts.to_h5(file.create_group("contexts"))
    with h5py.File(tmp_path / "c.h5") as file:
        assert same(kind.from_h5(file["contexts"]), contexts)
        assert file["contexts/position"].dtype == np.int32 and file["contexts/document"].dtype == np.int64


def test_refuses_other_latents(make_corpus):
    with pytest.raises(DataError, match="4 latents take no firings of 6"):
        TopContexts(4, 2).update(make_corpus(5).firings)
    with pytest.raises(DataError, match="cannot be merged"):
        TopContexts(4, 2).merge(TopContexts(4, 3))
