import numpy as np
import pytest

from sae_persona.activations.dialogues import Dialogue
from sae_persona.errors import DataError
from sae_persona.features.examples import Ids, unmeasured

CHAT = Dialogue.from_row(
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ahoy fool", "spans": [{"start": 5, "stop": 9, "labels": {"rude": 1}}]},
            {"role": "assistant", "content": "bye"},
        ],
        "labels": {"pirate": 0},
        "weights": {"pirate": 0.25},
        "hard": True,
        "covariates": {"age": 3},
        "id": "a",
    },
    "here",
)


def test_rows_are_labelled_answers_and_spans_with_all_that_is_known():
    pooled = unmeasured(["plain", CHAT, Dialogue(text="unlabelled"), Dialogue(text="c", labels={"rude": 0.0})])
    assert pooled.ids.tolist() == ["a:0[5:9]", "a:1", "3:0"] and pooled.dialogue.tolist() == [1, 1, 3]
    assert pooled.texts.tolist() == ["fool", "bye", "c"] and pooled.answer.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(pooled.labels, np.float32([[np.nan, 1], [0, np.nan], [np.nan, 0]]))
    np.testing.assert_array_equal(pooled.weights, np.float32([[1, 1], [0.25, 1], [1, 1]]))
    assert pooled.hard.tolist() == [True, True, False]
    assert pooled.covariate_names == ("age",) and pooled.covariates[:, 0].tolist()[:2] == [3, 3]
    assert np.isnan(pooled.covariates[2, 0]) and pooled.n_latents == 0 and len(pooled.dense["pre"]) == 3
    assert len(unmeasured(["plain"])) == 0


def test_an_id_stands_once():
    ids = Ids()
    for number, text in enumerate([CHAT, "plain", Dialogue(text="no id"), Dialogue(text="no id")]):
        ids.add(text, number)
    with pytest.raises(DataError, match="id 'a' stands twice, at texts 0 and 4: give each its own, or none"):
        ids.add(CHAT, 4)
