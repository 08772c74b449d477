"""A track as two charts: the panel's score against judged behaviour, and both along each fine-tune."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from sae_persona.errors import DataError
from sae_persona.report.numbers import number, percent
from sae_persona.report.svg import Axis, Box, Drawing, apart
from sae_persona.runs import write_text
from sae_persona.studies.track import Scored, Track

_LEFT, _RIGHT, _TOP, _FLOOR = 50, 396, 30, 272
_HERE = Path(__file__).parent


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def score_by_rate(track: Track, measure: str) -> Markup:
    """Each judged checkpoint: judged rate across, score upwards, with 95 % intervals both ways; circles are misaligned,
    diamonds aligned. Empty where nobody has judged."""
    rows = [row for row in track.rows if not math.isnan(row.misaligned.value)]
    if not rows:
        return Markup("")
    draw = Drawing(400, 330, f"Score of {measure} against the judged rate of misaligned answers")
    y = Axis(*_range([v for row in rows for v in row.scores[measure]]), _FLOOR, _TOP)
    x = Axis(0, 1, _LEFT + 6, _RIGHT - 4)
    draw.y_axis(
        y, (_LEFT, _RIGHT), f"{measure}, standard deviations from the base", [(v, number(v)) for v in y.ticks()]
    )
    draw.x_axis(x, _FLOOR + 6, "misaligned answers, judged", [(v, percent(v)) for v in (0, 0.25, 0.5, 0.75, 1)])
    for row in rows:
        score, rate = row.scores[measure], row.misaligned
        kind = "latent" if row.is_misaligned else "dense"
        draw.whisker((x.at(rate.low), x.at(rate.high)), (y.at(score.value), y.at(score.value)), kind)
        draw.whisker((x.at(rate.value), x.at(rate.value)), (y.at(score.low), y.at(score.high)), kind)
    for row in rows:
        kind = "latent" if row.is_misaligned else "dense"
        title = f"{row.name}{'' if row.step is None else f' @ {row.step}'}: {row.scores[measure].value:+.2f}"
        draw.mark(x.at(row.misaligned.value), y.at(row.scores[measure].value), kind, title=title)
    return draw.svg()


def scores_by_step(track: Track, measure: str) -> Markup:
    """The score along every fine-tune with several checkpoints. Empty if there is none."""
    runs: dict[str, list[Scored]] = defaultdict(list)
    for row in track.rows:
        if row.step is not None:
            runs[row.name].append(row)
    curves = [sorted(run, key=lambda row: row.step or 0) for run in runs.values() if len(run) > 1]
    if not curves:
        return Markup("")
    draw = Drawing(400, 330, f"Score of {measure} along fine-tunes")
    x = Axis(0, max(run[-1].step or 1 for run in curves), _LEFT + 6, _RIGHT - 4)
    y = Axis(*_range([row.scores[measure].value for run in curves for row in run]), _FLOOR, _TOP)
    draw.y_axis(
        y, (_LEFT, _RIGHT), f"{measure}, standard deviations from the base", [(v, number(v)) for v in y.ticks()]
    )
    draw.x_axis(x, _FLOOR + 6, "steps", apart(x, [(v, f"{v:g}") for v in x.ticks()]))
    area = Box(_LEFT + 2, 16, _RIGHT + 2, _FLOOR - 2)
    for run in curves:
        points = [(x.at(row.step or 0), y.at(row.scores[measure].value)) for row in run]
        draw.curve(points, "latent" if run[-1].is_misaligned else "dense")
    for run in curves:
        end = run[-1]
        kind = "latent" if end.is_misaligned else "dense"
        draw.label(x.at(end.step or 0), y.at(end.scores[measure].value), end.name, kind, area)
    return draw.svg()


def write_track(track: Track, out: Path) -> Path:
    """Write both charts and the table as one HTML page, whole or not at all. DataError if there is nothing to draw."""
    measure = next(iter(track.rows[0].scores))
    charts = [chart for chart in (score_by_rate(track, measure), scores_by_step(track, measure)) if chart]
    if not charts:
        raise DataError("no checkpoint was judged, and no fine-tune has several: there is nothing to draw")
    style = Markup((_HERE / "page.css").read_text(encoding="utf-8"))
    body = Markup("").join(Markup("<section>{}</section>").format(chart) for chart in charts)
    page = Markup(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>Track</title><style>{} svg .curve.dense {{ stroke: var(--dense); }}</style>"
        "<main><h1>Track</h1>{}<pre>{}</pre></main></html>\n"
    )
    write_text(out, page.format(style, body, str(track)))
    return out
