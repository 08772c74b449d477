"""Centred midranks against scipy.stats.rankdata."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse
from scipy.stats import rankdata

from sae_persona.attribution.midranks import SortedColumns
from sae_persona.errors import DataError

columns = hnp.arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=st.integers(-2, 3))


def dense(ranked: SortedColumns, entries: torch.Tensor) -> np.ndarray:
    """[m, n_latents] from what the entries carry."""
    return ranked.products(entries, torch.eye(ranked.m)).numpy().T


@settings(max_examples=200, deadline=None)
@given(columns)
def test_ranks_are_those_of_the_dense_columns(values):
    ranked = SortedColumns.of(values)
    got = dense(ranked, ranked.centred) + ranked.zero_midrank.numpy()
    np.testing.assert_array_equal(got, rankdata(values, axis=0))
    np.testing.assert_array_equal(dense(ranked, ranked.value), values)


@settings(max_examples=100, deadline=None)
@given(columns, st.integers(0, 2**12 - 1))
def test_a_subset_ranks_as_if_it_were_alone(values, bits):
    keep = np.array([i for i in range(len(values)) if bits >> i & 1] or [0])
    part, alone = SortedColumns.of(values).rows(keep), SortedColumns.of(values[keep])
    for name in ("centred", "zero_midrank", "zeros", "offsets"):
        np.testing.assert_array_equal(getattr(part, name), getattr(alone, name))
    np.testing.assert_array_equal(dense(part, part.value), values[keep])


@settings(max_examples=50, deadline=None)
@given(columns)
def test_some_latents_rank_as_among_all(values):
    chosen = np.arange(0, values.shape[1], 2)
    part, alone = SortedColumns.of(values).latents(chosen), SortedColumns.of(values[:, chosen])
    np.testing.assert_array_equal(dense(part, part.centred), dense(alone, alone.centred))


@settings(max_examples=100, deadline=None)
@given(columns, st.integers(0, 3**12 - 1))
def test_columns_within_groups_rank_as_if_each_group_were_alone(values, code):
    groups = np.array([code // 3**i % 3 for i in range(len(values))])
    ranked = SortedColumns.of(values).within(groups, 3)
    got = dense(ranked, ranked.centred) + ranked.zero_midrank.numpy()
    for group in range(3):
        here = groups == group
        if here.any():
            np.testing.assert_array_equal(got[here, group::3], rankdata(values[here], axis=0))


def test_columns_without_entries_have_only_zeros():
    ranked = SortedColumns.of(np.zeros((5, 3)))
    assert ranked.zeros.tolist() == [5, 5, 5] and ranked.zero_midrank.tolist() == [3, 3, 3]
    assert len(ranked.doubled) == 0 and ranked.products(ranked.doubled, torch.ones(5, 2)).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_has_no_rank_is_refused(odd):
    values = np.eye(4)
    values[2, 1] = odd
    for matrix in (values, sparse.csr_matrix(values)):
        with pytest.raises(DataError, match=f"latent 1 is {odd} at example 2, a finite number is wanted"):
            SortedColumns.of(matrix)
