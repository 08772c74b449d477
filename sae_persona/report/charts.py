"""A ranking as a volcano plot, and training curves."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from sae_persona.attribution.ranking import Ranking
from sae_persona.report.numbers import number, percent, signed
from sae_persona.report.svg import Axis, Box, Drawing, apart


def threshold(ranking: Ranking) -> float | None:
    """|z| at which max-T passes 5 %: halfway between the rows on either side. None if all rows are on one side."""
    passed = [abs(row.z) for row in ranking if row.p_max_t <= 0.05]
    failed = [abs(row.z) for row in ranking if row.p_max_t > 0.05]
    return (min(passed) + max(failed)) / 2 if passed and failed else None


def volcano(ranking: Ranking, chosen: int | None) -> Markup:
    """Each ranked latent: AUROC - 0.5 on train across, |z| upwards (log scale); the chosen latent marked."""
    rows = [row for row in ranking if row.z and math.isfinite(row.auroc.value)]
    if not rows:
        return Markup("")
    draw = Drawing(390, 370, f"Volcano plot of the ranking for {ranking.persona}")
    reach = max(0.1, 1.1 * max(abs(row.auroc.value - 0.5) for row in rows))
    sizes = [abs(row.z) for row in rows]
    x = Axis(-reach, reach, 42, 382)
    y = Axis(min(sizes) / 1.15, max(*sizes, min(sizes) * 2) * 1.25, 324, 28, log=True)
    draw.y_axis(y, (42, 382), "|z|, log scale", [(v, number(v)) for v in y.ticks()])
    draw.x_axis(x, 324, "AUROC − 0.5, train", [(v, signed(v)) for v in x.ticks()])
    draw.line([(x.at(0), 324), (x.at(0), 28)], "grid")
    area = Box(44, 20, 388, 322)
    if bar := threshold(ranking):
        draw.line([(42, y.at(bar)), (382, y.at(bar))], "limit")
        draw.take(42, y.at(bar) - 1, 382, y.at(bar) + 1)
    for row in reversed(rows):  # strongest on top
        kind = "latent" if row.latent == chosen else "seen" if row.p_max_t <= 0.05 else "faint"
        title = f"latent {row.latent}: z {signed(row.z, 3)}, AUROC {number(row.auroc.value)}"
        at = x.at(row.auroc.value - 0.5), y.at(abs(row.z))
        draw.mark(*at, kind, title=title, size=6 if kind == "latent" else 3.5)
    if bar:
        draw.label(382, y.at(bar), "max-T 5 %", "muted", area)
    for row in sorted(rows, key=lambda row: row.latent != chosen)[:5]:
        name, kind = (f"latent {row.latent}", "latent") if row.latent == chosen else (str(row.latent), "muted")
        draw.label(x.at(row.auroc.value - 0.5), y.at(abs(row.z)), name, kind, area)
    return draw.svg()


def training_curve(steps: Sequence[dict[str, Any]], name: str, label: str, *, log: bool = False) -> Markup:
    """One measure against the tokens seen; the last value in words. Empty if it was not logged."""
    points = [(step["tokens"], step[name]) for step in steps if _is_number(step.get(name))]
    points = [point for point in points if not log or point[1] > 0]
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return Markup("")
    values = [value for _, value in points]
    draw = Drawing(320, 230, f"{label} during training")
    x = Axis(0, points[-1][0], 46, 306)
    low, high = min(values), max(values)
    y = Axis(low / 1.1, high * 1.15, 180, 28, log=True) if log else Axis(0, max(high, 1e-9) * 1.25, 180, 28)
    form = percent if name == "dead" else number
    draw.y_axis(y, (46, 312), label, [(v, form(v)) for v in y.ticks(4)])
    draw.x_axis(x, 184, "tokens", apart(x, [(v, _short(v)) for v in x.ticks(3)]))
    draw.curve([(x.at(t), y.at(v)) for t, v in points])
    draw.mark(x.at(points[-1][0]), y.at(values[-1]), "latent", title=f"{form(values[-1])}")
    draw.label(x.at(points[-1][0]), y.at(values[-1]), form(values[-1]), "latent", Box(48, 16, 320, 182))
    return draw.svg()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(tokens: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:g} {letter}"
    return f"{tokens:g}"
