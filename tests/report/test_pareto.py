"""The Pareto front of several SAEs, their chart and their page."""

import json
import re
from dataclasses import replace

import pytest

from sae_persona.errors import DataError
from sae_persona.report.pareto import Point, chart, front, point_of, render, rows, write_pareto

BASE = Point(
    name="a", n_latents=4096, k=8, rule="batch_topk", hook="layers.1.resid_post", l0=8.0, fvu=0.4, ce_recovered=0.8,
    dead=0.01,
)  # fmt: skip


def points(*values, **changes):
    """Points of (L0, FVU), named a, b, c ..."""
    return [
        replace(BASE, name=name, k=round(l0), l0=l0, fvu=fvu, ce_recovered=1 - fvu, **changes)
        for name, (l0, fvu) in zip("abcdefgh", values, strict=False)
    ]


def test_the_front_is_what_nothing_beats():
    found = points((8, 0.4), (16, 0.3), (16, 0.35), (32, 0.31), (64, 0.2), (7, 0.4), (64, 0.2))
    assert [p.name for p in front(found, "fvu")] == ["f", "b", "e"]
    assert [p.name for p in front(found, "ce_recovered")] == ["f", "b", "e"]


def test_the_front_matches_the_definition_on_many_points():
    found = [replace(BASE, name=str(i), l0=8 + 37 * i % 23, fvu=(53 * i % 29) / 29) for i in range(60)]
    kept = {(p.l0, p.fvu) for p in front(found, "fvu")}
    beaten = {
        (p.l0, p.fvu)
        for p in found
        if any(q.l0 <= p.l0 and q.fvu <= p.fvu and (q.l0, q.fvu) != (p.l0, p.fvu) for q in found)
    }
    assert kept == {(p.l0, p.fvu) for p in found} - beaten


def test_what_was_not_measured_is_on_no_front():
    known, unknown = points((8, 0.4), (16, 0.3))
    unknown = replace(unknown, ce_recovered=None)
    assert front([known, unknown], "ce_recovered") == [known]
    assert [(r["name"], r["fvu_front"], r["ce_recovered_front"]) for r in rows([unknown, known])] == [
        ("a", True, True),
        ("b", True, False),
    ]
    assert chart([unknown], "ce_recovered") == ""


def test_a_chart_joins_the_points_of_a_series_and_fills_the_front():
    narrow, wide = points((8, 0.4), (16, 0.3)), points((8, 0.35), (16, 0.32), n_latents=16384)
    drawn = chart([*narrow, *wide], "fvu")
    assert drawn.count("<polyline") == 3, "two series and the front"
    assert drawn.count("latent hollow") == 1 and drawn.count("dense hollow") == 1
    for text in ("FVU (lower is better)", "L0: latents a token, log scale", ">4,096 latents<", ">16,384 latents<"):
        assert text in drawn
    assert ">batch_topk" not in drawn, "what all share is not in the legend"
    other = points((12, 0.5), rule="jumprelu")
    assert ">4,096 latents, jumprelu<" in chart([*narrow, *other], "fvu")


@pytest.mark.parametrize("measure", ["fvu", "ce_recovered"])
def test_every_mark_and_tick_lies_inside(measure):
    found = points((0.5, 1.3), (8, 0.4), (4000, 0.001))
    drawn = chart(found, measure)
    height = float(re.search(r'viewBox="0 0 400 (\d+)"', drawn)[1])
    marks = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', drawn)]
    assert len(marks) == len(found) + 1  # and the legend's
    assert all(46 <= x <= 400 and 0 <= y <= height for x, y in marks)
    assert "nan" not in drawn and "inf" not in drawn


def test_one_point_makes_a_chart():
    assert 'class="mark latent"' in chart([BASE], "fvu")
    perfect = replace(BASE, fvu=0.0, ce_recovered=1.0)
    assert "nan" not in chart([perfect], "fvu") + chart([perfect], "ce_recovered")


def test_ticks_of_a_narrow_range_differ():
    found = [replace(p, ce_recovered=1 - p.fvu / 40) for p in points((8, 0.4), (16, 0.3), (64, 0.1))]
    ticks = re.findall(r">([\d.]+)\N{NO-BREAK SPACE}%</text>", chart(found, "ce_recovered"))
    assert len(ticks) >= 3 and len(set(ticks)) == len(ticks)
    assert all(98 <= float(tick) <= 100 for tick in ticks), "in per cent"


def test_the_page_needs_no_network_and_escapes_names(tmp_path):
    found = [*points((8, 0.4), (16, 0.3)), replace(BASE, name="<b>x", ce_recovered=None, dead=None, fvu=0.9)]
    page = write_pareto(found, tmp_path / "pareto.html").read_text()
    assert "http" not in page and "<script" not in page and "<b>x" not in page and "&lt;b&gt;x" in page
    assert page.count("<svg") == 2 and "prefers-color-scheme: dark" in page and page == render(found)
    assert "CE recovered was not measured" not in page
    alone = render([found[-1]])
    assert alone.count("<svg") == 1 and "CE recovered was not measured" in alone


def test_rows_are_json():
    found = points((16, 0.3), (8, 0.4))
    assert json.loads(json.dumps(rows(found), allow_nan=False)) == rows(found)
    assert [row["l0"] for row in rows(found)] == [8, 16]


def test_no_sae_is_an_error():
    with pytest.raises(DataError, match="no SAE to compare"):
        render([])


def test_a_run_is_a_point(full):
    point, training = point_of(full), full.stage("train")["training"]
    assert (point.name, point.hook) == (full.path.name, full.stage("train")["hook"])
    assert (point.n_latents, point.k, point.rule) == (training["n_latents"], training["k"], training["rule"])
    assert (point.l0, point.fvu, point.ce_recovered, point.dead) == (0.25, 0.25, None, 0.25)
    full.quality.unlink()
    with pytest.raises(DataError, match=r"has no quality.json: train it with --held-out TEXTS"):
        point_of(full)
