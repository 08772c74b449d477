"""Coupling as a page: for each way of moving a trait a heat map of effects, and what foretells them."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from sae_persona.attribution.association import Interval
from sae_persona.report.numbers import DASH, number, p_value, points
from sae_persona.report.svg import Axis, Box, Drawing
from sae_persona.runs import write_text
from sae_persona.studies.coupling import Coupling, Effects
from sae_persona.studies.foretelling import COLUMN, Foretold

_HERE = Path(__file__).parent
_NAMES, _TOP, _CELL_W, _CELL_H = 132, 96, 58, 30
_WORDS = {
    "clamp": "Each trait's best latent is clamped",
    "steer": "Each trait's difference of means is added",
    "fine-tune": "The model is tuned on rows that show the trait",
}
_STYLE = """
.heat text { font-size: 12.5px; fill: var(--ink); } .heat .head { fill: var(--muted); }
.heat .up { fill: var(--latent); } .heat .down { fill: var(--dense); } .heat .own { fill: none; stroke: var(--ink); }
.heat .sure { font-weight: 650; } .heat .unsure { fill: var(--muted); }
.heat-scroll { overflow-x: auto; } .heat-scroll svg { min-width: 620px; max-width: 900px; }
.mark.dense { fill: var(--dense); } table.by { margin-top: 1rem; } figure.by { margin: 1.5rem 0 0; max-width: 460px; }
"""


def heat_map(effects: Effects) -> Markup:
    """Rows: what is moved; columns: what is measured, in percentage points; strong where the interval is off 0."""
    n = len(effects.traits)
    draw = Drawing(
        _NAMES + n * _CELL_W + 4, _TOP + n * _CELL_H + 6, f"Effect of moving each trait on all: {effects.how}"
    )
    for j, trait in enumerate(effects.traits):
        x = _NAMES + (j + 0.5) * _CELL_W
        draw.add(
            '<text class="head" x="{0}" y="{1}" transform="rotate(-38 {0} {1})">{2}</text>', x - 6, _TOP - 8.0, trait
        )
    for i, (trait, row) in enumerate(zip(effects.traits, effects.matrix, strict=True)):
        y = _TOP + i * _CELL_H
        draw.text(_NAMES - 10, y + _CELL_H / 2 + 4, trait, "head", "end")
        for j, cell in enumerate(row):
            _cell(draw, _NAMES + j * _CELL_W, y, cell, own=i == j, title=f"{trait} on {effects.traits[j]}")
    return Markup('<div class="heat-scroll heat">{}</div>').format(draw.svg())


def _cell(draw: Drawing, x: float, y: float, cell: Sequence[float], *, own: bool, title: str) -> None:
    value, low, high = cell
    known = math.isfinite(value)
    kind = "up" if known and value >= 0 else "down"
    sure = known and (low > 0 or high < 0)
    told = f"{title}: {points(value)} points [{points(low)}, {points(high)}]"
    draw.add(
        '<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="3" fill-opacity="{:.2f}"><title>{}</title></rect>',
        kind, x + 1.5, y + 1.5, _CELL_W - 3.0, _CELL_H - 3.0, 0.75 * min(1.0, abs(value)) if known else 0.0, told,
    )  # fmt: skip
    if own:
        draw.add(
            '<rect class="own" x="{}" y="{}" width="{}" height="{}" rx="3"/>',
            x + 1.5, y + 1.5, _CELL_W - 3.0, _CELL_H - 3.0,
        )  # fmt: skip
    draw.text(x + _CELL_W / 2, y + _CELL_H / 2 + 4.5, points(value), "sure" if sure else "unsure")


def scatter(coupling: Coupling, at: int, measure: str) -> Markup:
    """Each ordered pair: the measure across, the effect upwards; diamonds are pairs into the column that moves most."""
    effects = coupling.effects[at]
    x_of, y_of = np.array(coupling.relatedness[measure], np.float64), effects.values
    pairs = [
        (i, j) for i in range(len(y_of)) for j in range(len(y_of)) if i != j and np.isfinite(x_of[i, j] + y_of[i, j])
    ]
    if len(pairs) < 2:
        return Markup("")
    column = max(range(len(y_of)), key=lambda j: np.mean([abs(y_of[i, j]) for i, k in pairs if k == j] or [0]))
    draw = Drawing(400, 330, f"Effect against {measure}")
    x = Axis(*_range([x_of[p] for p in pairs]), 56, 392)
    y = Axis(*_range([y_of[p] for p in pairs]), 272, 30)
    draw.y_axis(y, (50, 396), "effect, percentage points", [(v, points(v)) for v in y.ticks()])
    draw.x_axis(x, 278, measure, [(v, number(v)) for v in x.ticks()])
    names = effects.traits
    for i, j in pairs:
        title = f"{names[i]} on {names[j]}: {points(y_of[i, j])} points at {number(x_of[i, j])}"
        draw.mark(x.at(x_of[i, j]), y.at(y_of[i, j]), "dense" if j == column else "latent", title=title, size=3.5)
    area = Box(52, 16, 398, 270)
    for i, j in sorted(pairs, key=lambda p: -abs(y_of[p]))[:3]:
        draw.label(x.at(x_of[i, j]), y.at(y_of[i, j]), f"{names[i]} on {names[j]}", "muted", area)
    return draw.svg()


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _two(interval: Interval) -> Markup:
    value, low, high = (DASH if math.isnan(part) else f"{part:+.2f}".replace("-", "−") for part in interval)
    return Markup('<span class="v">{}</span> <span class="ci">[{}, {}]</span>').format(value, low, high)


def _table(found: Sequence[Foretold]) -> Markup:
    rows = Markup("").join(
        Markup("<tr{}><th>{}</th><td class=n>{}</td><td class=n>{}</td><td class=n>{}</td></tr>").format(
            Markup(" class=chosen") if one.by == COLUMN else "",
            one.by,
            _two(one.spearman),
            "" if math.isnan(one.p) else p_value(one.p),
            _two(one.r2),
        )
        for one in found
    )
    return Markup(
        "<div class=scroll><table class=by><thead><tr><th>foretold by</th><th class=n>Spearman</th><th class=n>"
        "p, Mantel</th><th class=n>out-of-sample R²</th></tr></thead><tbody>{}</tbody></table></div>"
    ).format(rows)


def _section(coupling: Coupling, at: int) -> Markup:
    effects, found = coupling.effects[at], coupling.foretold[at]
    said = coupling.verdict(at).partition(": ")[2]
    single = [one for one in found if not math.isnan(one.p)]
    best = max(single, key=lambda one: one.r2.value if math.isfinite(one.r2.value) else -math.inf, default=None)
    chart = "" if best is None else scatter(coupling, at, best.by)
    lost = min((cell.value for cell in effects.valid), default=math.nan)
    note = (
        "Rows: the trait that is moved; columns: the trait that is measured. Percentage points of the judged rate; "
        "bold where the 95 % interval is off 0; framed: a trait on itself. "
        f"The costliest changes valid answers by {points(lost)} points."
    )
    return Markup(
        "<section><h2>{}</h2><p class=verdict>{}.</p>{}<p class=note>{}</p>{}<figure class=by>{}"
        "<figcaption>{}</figcaption></figure></section>"
    ).format(
        _WORDS.get(effects.how, effects.how),
        said[:1].upper() + said[1:],
        heat_map(effects),
        note,
        _table(found),
        chart,
        ""
        if best is None
        else f"The single measure that foretells best: {best.by}. Diamonds: the column that moves most.",
    )


def write_coupling(coupling: Coupling, out: Path) -> Path:
    """Write the heat maps and who foretells them as one HTML page, whole or not at all."""
    style = Markup((_HERE / "page.css").read_text(encoding="utf-8") + _STYLE)
    sections = Markup("").join(_section(coupling, at) for at in range(len(coupling.effects)))
    page = Markup(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>Coupling</title><style>{}</style><main><h1>Which traits pull which along</h1>"
        "<p class=facts>{}, {} traits, {} ordered pairs; out of sample: a pair is foretold from pairs that share no "
        "trait with it; intervals over traits.</p>{}</main></html>\n"
    )
    n = len(coupling.traits)
    write_text(out, page.format(style, coupling.model, n, n * (n - 1), sections))
    return out
