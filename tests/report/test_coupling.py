"""The page of a coupling: every cell, what foretells, and no way for a name to break it."""

import math
import re

from sae_persona.attribution.association import Interval
from sae_persona.report.coupling import heat_map, scatter, write_coupling
from sae_persona.studies.coupling import Coupling, Effects
from sae_persona.studies.foretelling import COLUMN, Foretold

TRAITS = ("calm", "<b>", "loud")
NAN = float("nan")


def near(value, by=0.05):
    return Interval(value, value - by, value + by)


def made():
    cells = [[0.4, 0.02, -0.3], [0.1, 0.5, 0.0], [NAN, 0.2, 0.6]]
    effects = Effects(
        "steer", TRAITS, (1.0, 2.0, 3.0), (0.1, 0.2, 0.3), tuple(tuple(map(near, r)) for r in cells), (near(-0.07),) * 3
    )
    relatedness = {"RBO": tuple(tuple(0.1 * (i + 2 * j) for j in range(3)) for i in range(3))}
    foretold = (Foretold("RBO", near(0.5), 0.02, near(0.3), 5), Foretold(COLUMN, near(0.1), NAN, near(-0.2), 5))
    return Coupling("a model", TRAITS, {}, relatedness, (effects,), (foretold,))


def test_each_cell_is_drawn_by_sign_and_size():
    drawn = str(heat_map(made().effects[0]))
    fills = re.findall(r'<rect class="(up|down)"[^>]*fill-opacity="([\d.]+)"><title>([^<]*)', drawn)
    assert len(fills) == 9 and drawn.count('class="own"') == 3
    by_title = {title.partition(":")[0]: (kind, float(opacity)) for kind, opacity, title in fills}
    assert by_title["calm on calm"] == ("up", 0.3) and by_title["calm on loud"][0] == "down"
    assert by_title["loud on calm"][1] == 0, "what is not known has no colour"
    assert drawn.count('class="unsure"') == 3, "two intervals hold 0 and one is not known"
    assert "<b>" not in drawn and "&lt;b&gt;" in drawn


def test_each_known_pair_is_a_mark():
    drawn = str(scatter(made(), 0, "RBO"))
    assert len(re.findall(r'class="mark', drawn)) == 5 and "loud on calm" not in drawn


def test_the_page_is_whole(tmp_path):
    page = write_coupling(made(), tmp_path / "c.html").read_text()
    assert page.count("<svg") == 2 and "http" not in page and "<script" not in page
    assert "difference of means is added" in page and "3 traits, 6 ordered pairs" in page
    assert "The costliest changes valid answers by −7 points" in page and "<b>" not in page
    assert not math.isnan(made().foretold[0][0].p)
