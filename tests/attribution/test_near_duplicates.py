"""The index against all pairs, and what leaks from split to split."""

import re
from itertools import combinations

import numpy as np
import pytest

from sae_persona.attribution.near_duplicates import near_duplicates
from sae_persona.errors import ConfigError


def shingles(text, words):
    found = re.findall(r"\w+", text.casefold())
    return {tuple(found[i : i + words]) for i in range(max(len(found) - words, 0) + 1)} if found else set()


def jaccard(a, b, words):
    a, b = shingles(a, words), shingles(b, words)
    return len(a & b) / len(a | b) if a | b else 0.0


def corpus(n, seed=0):
    """Texts that share a template, some of them changed copies of one before."""
    random, texts = np.random.default_rng(seed), []
    for _ in range(n):
        body = [f"w{i}" for i in random.zipf(1.5, random.integers(0, 14)) % 50]
        if texts and random.random() < 0.5:
            body = texts[random.integers(len(texts))].split()[6:]
            body[random.integers(len(body)) if body else 0 :][:1] = ["changed"] if random.random() < 0.7 else []
        texts.append(" ".join(["would you say the following :", *body]))
    return texts


@pytest.mark.parametrize(("threshold", "words"), [(0.5, 2), (0.8, 2), (0.6, 5), (1.0, 1)])
def test_finds_exactly_the_pairs_that_all_pairs_find(threshold, words):
    texts = corpus(120)
    found = near_duplicates(texts, threshold=threshold, words=words)
    same = {
        frozenset(p)
        for p in combinations(range(120), 2)
        if shingles(texts[p[0]], words) == shingles(texts[p[1]], words)
    }
    assert same == {frozenset(p) for p in combinations(range(120), 2) if found.group[p[0]] == found.group[p[1]]}
    first = np.unique(found.group, return_index=True)[1]
    wanted = {
        (a, b): s for a, b in combinations(range(len(first)), 2)
        if (s := jaccard(texts[first[a]], texts[first[b]], words)) >= threshold
    }  # fmt: skip
    assert {(a, b): pytest.approx(s) for a, b, s in found.pairs} == wanted
    assert len(found.pairs) == len(wanted) and (threshold == 1 or wanted), "no pair is told twice"


def test_each_leaked_text_is_told_once_with_the_train_text_most_like_it():
    base = [f"word{i}" for i in range(20)]
    near, nearer = " ".join([*base[:18], "a", "b"]), " ".join([*base[:19], "a"])
    texts = [near, nearer, " ".join(base), "something else altogether , not like these", " ".join(base).upper(), "", ""]
    split = ["train", "train", "held_out", "held_out", "held_out", "train", "held_out"]
    leaks = near_duplicates(texts, threshold=0.7, words=5).leaks(split)
    assert [(leak.held_out, leak.train) for leak in leaks] == [(2, 1), (4, 1)]
    assert leaks[0].similarity == pytest.approx(15 / 17)
    same = near_duplicates(texts, threshold=0.7).leaks(["held_out" if i == 4 else "train" for i in range(7)])
    assert [tuple(leak) for leak in same] == [(4, 2, 1.0)]


def test_clusters_hang_together_through_others():
    base = [f"w{i}" for i in range(40)]
    chain = [" ".join(base[i : i + 30]) for i in (0, 4, 8)]
    found = near_duplicates([*chain, "another", chain[0]], threshold=0.7)
    assert len(found.pairs) == 2, "the ends of the chain are not alike"
    assert len(set(found.clusters[[0, 1, 2, 4]])) == 1 and found.clusters[3] not in found.clusters[[0, 1, 2, 4]]


def test_nothing_to_compare_and_settings_that_cannot_be():
    assert near_duplicates([]).pairs == () and near_duplicates([]).clusters.shape == (0,)
    with pytest.raises(ConfigError, match="threshold lies above 0 and up to 1"):
        near_duplicates(["a"], threshold=0)
