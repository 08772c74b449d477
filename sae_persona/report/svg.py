"""A small drawing board: axes, marks and labels that keep out of each other's way, as inline SVG.

Nothing here has a colour: a mark has a kind, which is a CSS class, so one drawing serves the light and the dark theme.
Lengths are in the drawing's own units, of which a phone shows about 0.85 pixels each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup

_GLYPH = 7.0
"""Width of a letter at the labels' size."""
_LINE = 15.0
_REACH = 5.0
"""Half a mark."""


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` on units from ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies; what is outside lies on the edge."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, n: int = 5) -> list[float]:
        """Between three and about ``n`` round values."""
        return self._log_ticks(n) if self.log else self._even_ticks(n)

    def _even_ticks(self, n: int) -> list[float]:
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / n))
        step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= n)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 10) for i in range(first, last + 1)]

    def _log_ticks(self, n: int) -> list[float]:
        if self.high < 5 * self.low:  # so little of a decade looks even
            return self._even_ticks(n)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for digits in ((1,), (1, 3), (1, 2, 5)):
            found = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
            if len(found) >= 3:
                break
        return found[:: math.ceil(len(found) / (n + 1))]


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@dataclass
class Drawing:
    """Parts of a drawing, and the places that are taken."""

    width: float
    height: float
    title: str
    parts: list[Markup] = field(default_factory=list)
    taken: list[Box] = field(default_factory=list)

    def add(self, form: str, *values: object) -> None:
        """Append markup; numbers are rounded, texts escaped."""
        rounded = [round(v, 1) if isinstance(v, float) else v for v in values]
        self.parts.append(Markup(form).format(*rounded))

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add('<polyline class="{}" points="{}"/>', kind, path)

    def curve(self, points: Sequence[tuple[float, float]], kind: str = "latent") -> None:
        """A line of what is measured, by default a latent's, which labels keep off."""
        self.line(points, f"curve {kind}")
        for (x0, y0), (x1, y1) in pairwise(points):
            n = max(1, round(math.hypot(x1 - x0, y1 - y0) / 8))
            for i in range(n + 1):
                x, y = x0 + (x1 - x0) * i / n, y0 + (y1 - y0) * i / n
                self.take(x - 2, y - 2, x + 2, y + 2)

    def text(self, x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle") -> None:
        self.add('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>', kind, x, y, anchor, text)

    def mark(self, x: float, y: float, kind: str, *, title: str = "", size: float = 4.0) -> None:
        """A dot, square (prompt) or diamond (dense), so that colour is not all that tells them apart."""
        shape = {
            "dense": f'<path class="mark {{}}" d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z"',
            "prompt": f'<rect class="mark {{}}" x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"',
        }.get(kind.split()[0], f'<circle class="mark {{}}" cx="{x:.1f}" cy="{y:.1f}" r="{size:g}"')
        self.add(shape + "><title>{}</title>" + f"</{shape[1:].split()[0]}>", kind, title)
        self.take(x - _REACH, y - _REACH, x + _REACH, y + _REACH)

    def whisker(self, x: tuple[float, float], y: tuple[float, float], kind: str) -> None:
        """A thin line from one point to another: an interval. None where an end is not known."""
        if not all(map(math.isfinite, (*x, *y))):
            return
        self.add('<line class="whisker {}" x1="{}" y1="{}" x2="{}" y2="{}"/>', kind, x[0], y[0], x[1], y[1])
        self.take(min(x) - 1, min(y) - 1, max(x) + 1, max(y) + 1)

    def take(self, left: float, top: float, right: float, bottom: float) -> None:
        """Keep labels out of a place."""
        self.taken.append(Box(left, top, right, bottom))

    def label(self, x: float, y: float, text: str, kind: str, area: Box) -> bool:
        """Write beside a mark where there is room inside ``area``; False, and nothing is written, if there is none."""
        wide = _GLYPH * len(text)
        sides = (11.0, -11.0 - wide, 26.0, -26.0 - wide, -wide / 2)
        near = [(x + side, y + down) for down in (-7.5, 9.0, -24.0, 24.0, -39.0, 39.0, -54.0) for side in sides]
        for left, top in near:
            box = Box(left, top, left + wide, top + _LINE)
            inside = area.left <= box.left and box.right <= area.right and area.top <= box.top
            if inside and box.bottom <= area.bottom and not any(box.meets(other) for other in self.taken):
                self.taken.append(box)
                self.text(left + wide / 2, top + 11.5, text, f"label {kind}")
                return True
        return False

    def x_axis(self, axis: Axis, y: float, label: str, names: Sequence[tuple[float, str]]) -> None:
        """Tick labels under ``y``, the axis' name under them."""
        self.add('<line class="axis" x1="{}" y1="{}" x2="{}" y2="{}"/>', axis.start, y, axis.stop, y)
        for value, name in names:
            self.add('<line class="axis" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>', axis.at(value), y, y + 4)
            self.text(axis.at(value), y + 17, name)
        self.text((axis.start + axis.stop) / 2, y + 36, label, "name")

    def y_axis(self, axis: Axis, x: tuple[float, float], label: str, names: Sequence[tuple[float, str]]) -> None:
        """Grid lines across ``x``, tick labels to their left, the axis' name above."""
        for value, name in names:
            self.add('<line class="grid" x1="{0}" y1="{1}" x2="{2}" y2="{1}"/>', x[0], axis.at(value), x[1])
            self.text(x[0] - 7, axis.at(value) + 4, name, anchor="end")
        self.text(2, 13, label, "name", "start")

    def svg(self) -> Markup:
        """The drawing as one element that is as wide as its place allows."""
        head = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">').format(
            self.width, self.height, self.title
        )
        return head + Markup("").join(self.parts) + Markup("</svg>")


def apart(axis: Axis, names: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Drop the tick labels that would touch the one before."""
    kept: list[tuple[float, str]] = []
    for value, name in names:
        if not kept or axis.at(value) - axis.at(kept[-1][0]) > 3.6 * (len(name) + len(kept[-1][1])):
            kept.append((value, name))
    return kept
