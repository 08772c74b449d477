"""TopContexts: against a loop over every latent and document."""

import h5py
import numpy as np
import pytest
from scipy import sparse

from sae_persona.errors import DataError
from sae_persona.features.contexts import WINDOW, TopContexts

N_LATENTS, KEPT = 6, 3


def corpus(seed: int, n: int = 20, first: int = 0) -> tuple[list[tuple[int, list[int]]], sparse.csr_matrix]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 40, n)
    documents = [(first + i, generator.integers(0, 99, length).tolist()) for i, length in enumerate(lengths)]
    acts = generator.integers(0, 6, (lengths.sum(), N_LATENTS)) * (generator.random((lengths.sum(), N_LATENTS)) < 0.1)
    acts[:, 0] = 0
    return documents, sparse.csr_matrix(acts.astype(np.float32))


def kept(*corpora) -> TopContexts:
    contexts = TopContexts(N_LATENTS, KEPT)
    for documents, acts in corpora:
        contexts.update(documents, acts)
    return contexts


def same(a: TopContexts, b: TopContexts) -> bool:
    return all(np.array_equal(vars(a)[name], vars(b)[name]) for name in vars(a))


def test_keeps_the_strongest_token_of_the_strongest_documents():
    documents, acts = corpus(0)
    contexts, dense, starts = kept((documents, acts)), acts.toarray(), np.cumsum([0, *(len(i) for _, i in documents)])
    for latent in range(N_LATENTS):
        peaks = []
        for number, ids in documents:
            column = dense[starts[number] : starts[number] + len(ids), latent]
            if column.max() > 0:
                peaks.append((-column.max(), number, int(column.argmax()), ids, column))
        wanted = sorted(peaks, key=lambda peak: peak[:2])[:KEPT]
        found = contexts.of(latent)
        assert [(-c.strength, c.document, c.position) for c in found] == [peak[:3] for peak in wanted]
        for context, (_, _, at, ids, column) in zip(found, wanted, strict=True):
            window = slice(max(at - WINDOW, 0), at + WINDOW + 1)
            assert context.tokens == ids[window]
            assert context.acts == column[window].tolist()


def test_merging_in_any_order_is_one_pass():
    first, second = corpus(1), corpus(2, first=20)
    whole, one, other = kept(first, second), kept(first), kept(second)
    one.merge(other)
    assert same(one, whole)
    other.merge(kept(first))
    assert same(other, whole)
    assert same(kept(second, first), whole)


def test_a_document_counts_once_even_if_it_comes_in_pieces():
    (documents, acts), (others, other_acts) = corpus(3), corpus(7)
    contexts = kept((documents, acts), (others, other_acts))  # the same numbers, other tokens
    for latent in range(N_LATENTS):
        found = contexts.of(latent)
        assert len({context.document for context in found}) == len(found)
    strongest = np.maximum(acts.max(0).toarray(), other_acts.max(0).toarray())[0]
    assert [max((c.strength for c in contexts.of(i)), default=0) for i in range(N_LATENTS)] == strongest.tolist()


def test_documents_on_which_nothing_fires_leave_no_context():
    documents, acts = corpus(6)
    assert same(kept((documents, acts * 0), ([], acts[:0])), TopContexts(N_LATENTS, KEPT))
    assert kept((documents, acts)).of(0) == []


def test_goes_through_a_file(tmp_path):
    contexts = kept(corpus(4))
    with h5py.File(tmp_path / "c.h5", "w") as file:
        contexts.to_h5(file.create_group("contexts"))
    with h5py.File(tmp_path / "c.h5") as file:
        assert same(TopContexts.from_h5(file["contexts"]), contexts)


def test_refuses_activations_of_other_texts():
    documents, acts = corpus(5)
    with pytest.raises(DataError, match="need acts of that shape"):
        kept((documents[1:], acts))
    with pytest.raises(DataError, match="cannot be merged"):
        TopContexts(4, 2).merge(TopContexts(4, 3))
