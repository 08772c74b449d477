"""Linear splines: what they span, where the knots lie, and how many there is room for."""

import numpy as np
import pytest

from sae_persona.attribution.splines import KNOTS, is_numeric, room_for_knots, splines


def left_of(target, columns):
    design = np.column_stack([np.ones(len(target)), columns])
    return np.abs(target - design @ np.linalg.lstsq(design, target, rcond=None)[0]).max()


def test_any_line_with_bends_at_the_quantiles_is_a_sum_of_the_columns():
    x = np.random.default_rng(0).permutation(np.arange(90.0))
    columns = splines(x[:, None], 8)
    assert columns.shape == (90, 9)
    knots = np.sort(np.quantile(x, np.arange(1, 9) / 9, method="inverted_cdf"))
    for heights in np.random.default_rng(1).normal(size=(3, 10)):
        target = np.interp(x, np.concatenate([[0], knots, [89]]), heights)
        assert left_of(target, columns) < 1e-8
    assert left_of(np.maximum(x - 44.5, 0), columns) < 3 < left_of(np.maximum(x - 44.5, 0), x[:, None])


def test_few_values_are_told_apart_wholly_and_two_need_no_bend():
    turn = np.random.default_rng(2).integers(0, 5, 200)
    topic = turn % 2 == 0
    columns = splines(np.column_stack([turn, topic, np.full(200, 3)]).astype(float), 8)
    assert columns.shape == (200, 1 + 3 + 1 + 1)
    for value in range(5):
        assert left_of((turn == value).astype(float), columns) < 1e-10
    assert is_numeric(np.column_stack([turn, topic])).tolist() == [True, False]


def test_a_value_of_most_examples_takes_no_more_than_its_share_of_the_knots():
    share = np.r_[np.zeros(400), np.linspace(0.01, 1, 100)]
    columns = splines(share[:, None], 4)
    assert columns.shape == (500, 5)
    knots = [share[(column > 0).argmax() - 1] for column in columns.T[1:]]
    assert knots == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.21) and len(set(knots)) == 4


@pytest.mark.parametrize(
    ("m", "blocks", "covariates", "knots"),
    [(1000, 1, 1, KNOTS), (80, 1, 1, 4), (80, 51, 1, 0), (80, 1, 3, 0), (480, 24, 5, 5), (40, 1, 0, 1)],
)
def test_knots_that_examples_have_room_for(m, blocks, covariates, knots):
    """Fifteen examples for each column; those that blocks take away do not count."""
    assert room_for_knots(np.random.default_rng(3).normal(size=(m, covariates)), blocks) == knots


def test_no_covariates_have_no_columns():
    assert splines(np.empty((7, 0)), 8).shape == (7, 0)
