"""Centred midranks against scipy.stats.rankdata."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import rankdata

from sae_persona.attribution.midranks import SortedColumns

columns = hnp.arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=st.integers(-2, 3))


@settings(max_examples=200, deadline=None)
@given(columns)
def test_ranks_are_those_of_the_dense_columns(values):
    ranked = SortedColumns.of(values)
    wanted = rankdata(values, axis=0)
    got = ranked.matrix.toarray().T + ranked.zero_midrank * np.ones(values.shape)
    np.testing.assert_array_equal(got, wanted)


@settings(max_examples=100, deadline=None)
@given(columns, st.integers(0, 2**12 - 1))
def test_a_subset_ranks_as_if_it_were_alone(values, bits):
    keep = np.array([bits >> i & 1 for i in range(len(values))], bool)
    if not keep.any():
        keep[0] = True
    part, alone = SortedColumns.of(values)[keep], SortedColumns.of(values[keep])
    np.testing.assert_array_equal(part.centred, alone.centred)
    np.testing.assert_array_equal(part.zero_midrank, alone.zero_midrank)


def test_columns_without_entries_have_only_zeros():
    ranked = SortedColumns.of(np.zeros((5, 3)))
    assert ranked.zeros.tolist() == [5, 5, 5] and ranked.zero_midrank.tolist() == [3, 3, 3]
    assert ranked.matrix.nnz == 0
