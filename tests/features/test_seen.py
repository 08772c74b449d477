"""First and last firing: against a loop, and parts in any order."""

import h5py
import pytest
import torch

from sae_persona.errors import DataError
from sae_persona.features.seen import Seen

N_LATENTS = 6


def seen(*corpora) -> Seen:
    found = Seen(N_LATENTS)
    for corpus in corpora:
        found.update(corpus.firings)
    return found


def test_first_and_last_of_the_corpus_in_any_order(make_corpus, tmp_path):
    corpus = make_corpus(0)
    found = seen(corpus.part(9), corpus.part(0, 9))
    for latent in range(N_LATENTS):
        places = sorted(entry[1:3] for entry in corpus.entries() if entry[0] == latent)
        assert found.of(latent) == ((places[0], places[-1]) if places else None)
    half = seen(corpus.part(1, every=2))
    half.merge(seen(corpus.part(0, every=2)))
    with h5py.File(tmp_path / "s.h5", "w") as file:
        half.to_h5(file.create_group("seen"))
        assert file["seen/first_document"][0] == file["seen/last_position"][0] == -1
        again = Seen.from_h5(file["seen"])
    for name in ("first", "last"):
        assert torch.equal(getattr(half, name), getattr(found, name))
        assert torch.equal(getattr(again, name), getattr(found, name))


def test_refuses_other_latents():
    with pytest.raises(DataError, match="3 latents cannot be merged into 2"):
        Seen(2).merge(Seen(3))
