"""Selecting a persona's examples, and the sentences that say why it cannot be done."""

import numpy as np
import pytest
from scipy import sparse

from sae_persona.attribution.labels import select
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.pooled import POOLS, Pooled


def pooled(
    labels, *, personas=("honest", "pirate"), split="train", template="", domain="", dialogue=None, weights=None
) -> Pooled:
    labels = np.array(labels, np.float32).reshape(len(labels), len(personas))
    n = len(labels)
    texts = {
        name: np.broadcast_to(np.array(part), n)
        for name, part in {"split": split, "template": template, "domain": domain, "author": "", "ids": ""}.items()
    }
    empty = sparse.csr_matrix((n, 3), dtype=np.float32)
    return Pooled(
        personas=personas,
        labels=labels,
        dialogue=np.arange(n) if dialogue is None else np.array(dialogue),
        n_answer_tokens=np.ones(n, int),
        pools=dict.fromkeys(POOLS, empty),
        dense=dict.fromkeys(("pre", "mean"), np.zeros((n, 2), np.float32)),
        weights=weights,  # pyright: ignore
        **texts,
    )


MIXED = [[1, 0], [0.5, 0], [np.nan, 0], [0.49, 1], [0, 1]] * 12


def test_takes_the_labelled_rows_of_the_split_and_0_5_is_a_yes():
    split = ["train"] * 30 + ["held_out"] * 30
    chosen = select(pooled(MIXED, split=split), "honest", "held_out")
    assert chosen.rows.tolist() == [i for i in range(30, 60) if i % 5 != 2]
    assert chosen.y.tolist() == [True, True, False, False] * 6
    assert chosen.counts == (12, 12) and chosen.n_blocks == 1


def test_blocks_are_template_by_domain_or_what_is_asked_for():
    data = pooled(MIXED, template=["a", "b"] * 30, domain=["x"] * 20 + ["y"] * 40)
    names = [f"{t}{d}" for t, d in zip(data.template, data.domain, strict=True)]
    chosen = select(data, "honest", "train")
    pairs = {(names[row], block) for row, block in zip(chosen.rows, chosen.blocks, strict=True)}
    assert len(pairs) == chosen.n_blocks == 4
    assert select(data, "honest", "train", within=("domain",)).n_blocks == 2
    assert select(data, "honest", "train", within=()).n_blocks == 1


def test_a_dialogue_counts_once_with_its_last_labelled_answer():
    data = pooled(MIXED, dialogue=np.arange(60) // 2)
    rows = select(data, "honest", "train").rows
    assert len(set(data.dialogue[rows])) == len(rows) == 30
    assert rows[:3].tolist() == [1, 3, 5]
    assert 6 in rows and 7 not in rows, "row 7 has no label, so the last labelled answer of dialogue 3 is row 6"


@pytest.mark.parametrize(
    ("data", "persona", "sentence"),
    [
        (pooled(MIXED), "pirrate", "no example is labelled 'pirrate': the labels are pirate, honest"),
        (pooled([], personas=()), "pirate", "no example is labelled, so 'pirate' cannot be ranked"),
        (pooled([[1, 0]] * 20), "honest", "'honest' has 20 examples with it and 0 without in the train split"),
        (pooled(MIXED[:10]), "honest", "'honest' has 4 examples with it and 4 without in the train split, at least 10"),
        (pooled(MIXED, split="held_out"), "honest", "'honest' has 0 examples with it and 0 without in the train split"),
        (
            pooled([[1, 0]] * 10 + [[0, 0]] * 10, template=["a"] * 10 + ["b"] * 10),
            "honest",
            "nothing can be permuted: in each of the 2 blocks .template x domain. all train examples are alike",
        ),
    ],
)
def test_says_in_one_line_what_is_wrong(data, persona, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        select(data, persona, "train")
    assert "\n" not in str(caught.value)


def test_within_dialogues_all_their_answers_count_and_are_permuted_among_themselves():
    data = pooled(MIXED, dialogue=np.arange(60) // 5)
    chosen = select(data, "honest", "train", within=("dialogue",))
    assert chosen.counts == (24, 24) and chosen.n_blocks == 12
    assert all(len(set(data.dialogue[chosen.rows[chosen.blocks == block]])) == 1 for block in range(12))


def test_uncertain_labels_are_left_out_for_that_persona_alone():
    weights = np.tile(np.float32([[0.7, 0.1], [0.9, 1]]), (30, 1))
    data = pooled([[1, 0], [0, 1], [0, 1], [1, 0]] * 15, weights=weights)
    assert len(select(data, "honest", "train", min_confidence=0.7).rows) == 60, (
        "though 0.7 in fp32 is a little less than 0.7"
    )
    sure = select(data, "honest", "train", min_confidence=0.71).rows
    assert sure.tolist() == list(range(1, 60, 2))
    with pytest.raises(DataError, match="0 examples with it and 0 without in the train split at a confidence of 1 or"):
        select(data, "honest", "train", min_confidence=1)
    with pytest.raises(ConfigError, match="min_confidence lies between 0 and 1, got 2"):
        select(data, "honest", "train", min_confidence=2)


def test_few_examples_are_taken_by_force_and_with_a_warning():
    assert select(pooled(MIXED), "honest", "train", force=True).warning == ""
    chosen = select(pooled(MIXED[:10]), "honest", "train", force=True)
    assert chosen.counts == (4, 4)
    assert chosen.warning.startswith("'honest' has 4 examples with it and 4 without in the train split: with fewer")
    with pytest.raises(DataError, match="has 2 examples with it and 1 without in the train split, at least 2"):
        select(pooled(MIXED[:4]), "honest", "train", force=True)


@pytest.mark.parametrize("odd", [-1, 1.5, 3])
def test_a_label_beyond_0_and_1_is_refused_with_its_persona(odd):
    labels = np.array(MIXED, np.float32)
    labels[7, 0] = odd
    with pytest.raises(DataError, match=f"a label of 'honest' is {odd:g}: labels lie between 0"):
        select(pooled(labels), "honest", "train")
    assert select(pooled(labels), "pirate", "train").counts == (24, 36)
