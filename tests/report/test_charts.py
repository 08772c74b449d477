"""Axes and labels of the charts, and what they leave out."""

import math
from dataclasses import replace

import pytest

from sae_persona.report.charts import threshold, training_curve, volcano
from sae_persona.report.curves import cost_range, off_chart, rate_by_cost, rate_by_strength
from sae_persona.report.svg import Axis, Box, Drawing, apart


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.4, 0.4, False, [-0.4, -0.2, 0, 0.2, 0.4]),
        (0.9, 1.7, True, [1, 1.2, 1.4, 1.6]),
        (0.02, 1, True, [0.03, 0.1, 0.3, 1]),
        (1, 1000, True, [1, 10, 100, 1000]),
    ],
)
def test_ticks_are_round(low, high, log, ticks):
    assert Axis(low, high, 0, 100, log=log).ticks() == pytest.approx(ticks)


def test_axis_puts_values_in_place():
    assert Axis(0, 2, 10, 30).at(1) == 20
    assert Axis(1, 100, 0, 10, log=True).at(10) == pytest.approx(5)
    assert Axis(0, 2, 10, 30).at(7) == 30


def test_labels_keep_apart():
    draw, area = Drawing(200, 60, ""), Box(0, 0, 200, 60)
    placed = [draw.label(100, 30, "twelve chars", "muted", area) for _ in range(20)]
    assert 1 < sum(placed) < 20
    boxes = draw.taken
    assert not any(a.meets(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert len(draw.parts) == sum(placed), "what finds no room is not written"


def test_crowded_tick_labels_are_dropped():
    names = [(0.0, "off"), (0.01, "0.01"), (1.0, "1")]
    assert apart(Axis(0, 1, 0, 200), names) == [names[0], names[2]]


def test_threshold_lies_between_the_rows(ranking):
    assert threshold(ranking) == pytest.approx((6 + 2) / 2)
    assert threshold(replace(ranking, rows=ranking.rows[:2])) is None


def test_volcano_marks_the_chosen_latent(ranking):
    drawn = volcano(ranking, 3)
    assert drawn.count('class="mark latent"') == 1 and ">latent 3<" in drawn
    assert drawn.count('class="mark faint"') == 2, "p (max-T) above 5 %"
    assert "max-T 5 %" in drawn
    assert volcano(replace(ranking, rows=()), None) == ""


def test_sweep_charts_show_every_arm(make_sweep):
    swept = make_sweep()
    by_strength, by_cost = rate_by_strength(swept), rate_by_cost(swept)
    for kind in ("random", "dense", "prompt", "baseline"):
        assert by_strength.count(f'class="mark {kind}"') == by_cost.count(f'class="mark {kind}"') == 1
    assert by_strength.count('class="mark wrong"') == 1 and 'class="mark wrong"' not in by_cost
    assert by_strength.count('class="mark latent hollow"') == 2
    assert by_cost.count('class="mark latent hollow"') == 1
    assert [arm.strength for arm in off_chart(swept)] == [2.0], "the one at 40 times the perplexity"
    assert cost_range(swept)[1] < 2


def _endless(interval):
    return interval._replace(low=math.nan, high=math.nan)


def test_sweep_charts_without_controls_or_rates(make_sweep):
    swept = make_sweep()
    alone = replace(swept, arms=tuple(arm for arm in swept.arms if arm.kind in ("baseline", "latent")))
    assert 'class="mark latent"' in rate_by_strength(alone) and "difference" not in rate_by_strength(alone)
    few = replace(
        swept, arms=tuple(replace(arm, rate=_endless(arm.rate), cost=_endless(arm.cost)) for arm in swept.arms)
    )
    for chart in (rate_by_strength, rate_by_cost):
        assert "nan" not in chart(few) and chart(few).count("mark latent") == chart(swept).count("mark latent")
        assert "whisker" in chart(swept) and "whisker" not in chart(few)
    unknown = swept.arms[0].rate._replace(value=math.nan)
    judged = replace(swept, arms=tuple(replace(arm, rate=unknown) for arm in swept.arms))
    assert rate_by_strength(judged) == rate_by_cost(judged) == ""


def test_training_curve_skips_what_is_not_a_number():
    steps = [{"tokens": 10 * i, "loss": value} for i, value in enumerate([3.0, None, math.nan, 1.0])]
    drawn = training_curve(steps, "loss", "loss", log=True)
    assert drawn.count(",") == 2 and "nan" not in drawn
    assert training_curve(steps, "fvu", "FVU") == ""


def test_texts_are_escaped():
    draw = Drawing(100, 50, "<b>")
    draw.text(1, 2, "<i>")
    draw.mark(1, 2, "seen", title="a & b")
    assert "&lt;b&gt;" in draw.svg() and "&lt;i&gt;" in draw.svg() and "a &amp; b" in draw.svg()
