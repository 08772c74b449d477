import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score

from sae_persona.activations.dialogues import Dialogue
from sae_persona.attribution.hard_negatives import hard_negatives
from sae_persona.attribution.labels import select
from sae_persona.errors import DataError
from sae_persona.features.examples import unmeasured


def examples(n_hard):
    rows = [Dialogue(text="x", labels={"pirate": float(i < 30)}, hard=30 <= i < 30 + n_hard or i == 0, split="train")
            for i in range(90)]  # fmt: skip
    return unmeasured(rows)


def test_a_latent_that_knows_words_only_fails_on_hard_negatives():
    pooled, random = examples(20), np.random.default_rng(0)
    y, hard = pooled.labels[:, 0] > 0, np.arange(90)
    hard = (hard >= 30) & (hard < 50)
    meaning, words = y * random.random(90), (y | hard) * random.random(90)
    values = np.stack([meaning, words, random.normal(size=90)], axis=1)
    chosen = select(pooled, "pirate", "train")
    found = hard_negatives(values, pooled, chosen)
    assert (found.n_positive, found.n_hard, found.n_other) == (30, 20, 40), "a positive is never a hard negative"
    for column in range(3):
        for interval, negatives in ((found.hard, hard), (found.other, ~y & ~hard)):
            here = y | negatives
            assert interval.value[column] == pytest.approx(roc_auc_score(y[here], values[here, column]))
    assert found.hard.low[0] > 0.9 and found.hard.low[1] < 0.5 < found.hard.high[1] and found.other.low[1] > 0.9
    latents = hard_negatives(sparse.csr_matrix(values[:, :2]), pooled, chosen)
    np.testing.assert_allclose(latents.hard.value, found.hard.value[:2])


def test_too_few_of_a_kind():
    pooled = examples(1)
    with pytest.raises(DataError, match="1 hard negatives and 59 others are here, at least 2 of each"):
        hard_negatives(np.zeros((90, 1)), pooled, select(pooled, "pirate", "train"))
