import math
from dataclasses import replace

import pytest

from sae_persona.attribution.association import Interval
from sae_persona.errors import DataError
from sae_persona.report.tracking import score_by_rate, scores_by_step, write_track
from sae_persona.studies.track import Scored, Track

NOBODY = Interval(math.nan, math.nan, math.nan)


@pytest.fixture
def track(interval):
    def row(name, step, score, rate, bad):
        return Scored(
            name, step, None, "a", "narrow", 0, not bad, interval(rate), bad, {"latents": interval(score, 0.3)}
        )

    rows = [row("<b>bad", step, step / 4, step / 80, step > 20) for step in (0, 20, 60)]
    return Track("panel", {}, (*rows, row("good", 60, -1.0, 0.02, False)), ())


def test_a_mark_for_each_judged_checkpoint(track):
    drawn = str(score_by_rate(track, "latents"))
    assert drawn.count('class="mark latent"') == 1 and drawn.count('class="mark dense"') == 3
    assert drawn.count("whisker") == 8 and "&lt;b&gt;bad" in drawn and "<b>" not in drawn
    unjudged = replace(track, rows=tuple(replace(row, misaligned=NOBODY) for row in track.rows))
    assert score_by_rate(unjudged, "latents") == ""


def test_a_curve_for_each_fine_tune_with_several(track):
    drawn = str(scores_by_step(track, "latents"))
    assert drawn.count("polyline") == 1 and 'class="curve latent"' in drawn
    assert scores_by_step(replace(track, rows=track.rows[-1:]), "latents") == ""


def test_a_page(track, tmp_path):
    told = replace(track, telling=(_telling(),))
    page = write_track(told, tmp_path / "t.html").read_text()
    assert page.count("<svg") == 2 and "<b>bad" not in page and "http" not in page.split("</style>")[1]
    nothing = replace(told, rows=(replace(track.rows[0], misaligned=NOBODY),))
    with pytest.raises(DataError, match="nothing to draw"):
        write_track(nothing, tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()


def _telling():
    from sae_persona.studies.track import Telling

    return Telling("latents", 1, 1, NOBODY, NOBODY, 0.5, 0.5)
