"""Agreement of templates against scikit-learn, a template at a time."""

import numpy as np
from scipy import sparse
from sklearn.metrics import roc_auc_score

from sae_persona.attribution.consistency import consistency
from sae_persona.attribution.midranks import SortedColumns


def test_is_scikit_learns_auroc_of_each_template():
    generator = np.random.default_rng(0)
    templates, y = generator.choice(["a", "b", "c"], 90), generator.random(90) < 0.5
    values = generator.integers(0, 4, (90, 5)) + (y & (templates != "c"))[:, None] * 2.0
    found = consistency(SortedColumns.of(sparse.csr_matrix(values)), y, templates, np.array([1, -1, 1, 1, 1.0]))
    each = np.array([[roc_auc_score(y[templates == t], c[templates == t]) for t in "abc"] for c in values.T])
    np.testing.assert_allclose(found.low, each.min(1))
    np.testing.assert_allclose(found.high, each.max(1))
    agree = (each > 0.5).mean(1)
    agree[1] = (each[1] < 0.5).mean()
    np.testing.assert_allclose(found.agreement, agree)
    assert found.n == 3 and agree[0] >= 2 / 3


def test_templates_of_one_class_are_not_looked_at():
    y, values = np.array([1, 1, 0, 0, 1, 1, 0, 1], bool), sparse.csr_matrix(np.arange(8.0)[:, None])
    found = consistency(SortedColumns.of(values), y, np.array(list("aaaabbbc")), np.ones(1))
    assert (found.n, found.low[0], found.high[0], found.agreement[0]) == (1, 0, 0, 0)
    nothing = consistency(SortedColumns.of(values), y, np.arange(8).astype(str), np.ones(1))
    assert nothing.n == 0 and np.isnan(nothing.agreement[0])
