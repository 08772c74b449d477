"""Numbers as people read them."""

import math

import pytest

from sae_persona.attribution.association import Interval
from sae_persona.report import numbers


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [
        (numbers.number, 0.0, "0"),
        (numbers.number, 1234567.0, "1,230,000"),
        (numbers.number, -0.01234, "−0.0123"),
        (numbers.number, 2.0e-7, "2.0e−07"),
        (numbers.number, math.nan, "–"),
        (numbers.number, None, "–"),
        (numbers.signed, 0.25, "+0.25"),
        (numbers.z_score, -6.66, "−6.7"),
        (numbers.percent, 0.283, "28\N{NO-BREAK SPACE}%"),
        (numbers.percent, 0.00391, "0.39\N{NO-BREAK SPACE}%"),
        (numbers.percent, 0.9977, "99.8\N{NO-BREAK SPACE}%"),
        (numbers.percent, 1.0, "100\N{NO-BREAK SPACE}%"),
        (numbers.percent, math.nan, "–"),
        (numbers.points, -0.08, "−8"),
        (numbers.points, -0.001, "0"),
        (numbers.times, 1.3, "1.30×"),
        (numbers.times, 398.88, "399×"),
        (numbers.strength, 0.75, "0.75×"),
        (numbers.p_value, 0.00999, "0.010"),
        (numbers.p_value, 7e-5, "<\N{NO-BREAK SPACE}0.001"),
        (numbers.p_value, math.nan, "–"),
    ],
)
def test_forms(form, value, shown):
    assert form(value) == shown


def test_p_value_of_no_permutation_as_good():
    assert numbers.p_value(1 / 1001, 1000) == "≤\N{NO-BREAK SPACE}0.001"
    assert numbers.p_value(2 / 1001, 1000) == "0.0020"


def test_interval_stands_behind_its_value():
    shown = numbers.with_interval(Interval(0.5, 0.4, 0.6), "percent")
    assert shown == '<span class="v">50\N{NO-BREAK SPACE}%</span> <span class="ci">[40, 60]</span>'
    unknown = numbers.with_interval(Interval(0.5, math.nan, math.nan), "percent")
    assert unknown == '<span class="v">50\N{NO-BREAK SPACE}%</span> <span class="ci">[–]</span>'
    assert numbers.with_interval(Interval(math.nan, math.nan, math.nan)) == numbers.with_interval(None) == "–"
