"""SAEs side by side: how much each rebuilds for how many latents a token, and which are worse in both than another."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sae_persona.errors import DataError
from sae_persona.report import numbers
from sae_persona.report.svg import Axis, Box, Drawing, apart
from sae_persona.runs import Run, read_json, write_text

Measure = Literal["fvu", "ce_recovered"]
KINDS = ("latent", "dense", "prompt", "violet", "dense rose", "prompt olive")
"""Colours and shapes of the series, over again from the seventh on."""
_LEFT, _RIGHT, _TOP, _FLOOR = 46, 396, 30, 262
_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Point:
    """One SAE, measured on held-out texts.

    l0            latents that fire on a token
    fvu           fraction of the activations' variance that the reconstruction misses
    ce_recovered  share of the loss from zero-ablation that the reconstruction makes good; None if not measured
    dead          share of the latents; None if not measured
    """

    name: str
    n_latents: int
    k: int
    rule: str
    hook: str
    l0: float
    fvu: float
    ce_recovered: float | None
    dead: float | None

    @property
    def series(self) -> tuple[int, str, str]:
        """Points of one series differ in k alone, and are joined."""
        return self.n_latents, self.rule, self.hook


def point_of(run: Run) -> Point:
    """What a run says of its SAE. DataError if its quality was not measured; RunError if nothing was trained in it."""
    trained = run.stage("train")
    if not run.quality.is_file():
        raise DataError(f"{run.path} has no quality.json: train it with --held-out TEXTS")
    quality, training = read_json(run.quality, "quality file"), trained["training"]
    return Point(
        name=run.path.name,
        n_latents=training["n_latents"],
        k=training["k"],
        rule=training["rule"],
        hook=trained["hook"],
        **{measure: quality[measure] for measure in ("l0", "fvu", "ce_recovered", "dead")},
    )


def front(points: Sequence[Point], measure: Measure) -> list[Point]:
    """Those that no other equals with fewer latents a token, or beats with as few; by rising L0."""
    sign = 1 if measure == "fvu" else -1
    known = [point for point in points if getattr(point, measure) is not None]
    found: list[Point] = []
    for point in sorted(known, key=lambda p: (p.l0, sign * getattr(p, measure))):
        if not found or sign * getattr(point, measure) < sign * getattr(found[-1], measure):
            found.append(point)
    return found


def rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """As JSON values, by width, rule, hook and L0, with whether each is on the front of either measure."""
    fronts = {measure: front(points, measure) for measure in ("fvu", "ce_recovered")}
    return [
        {**asdict(point), **{f"{measure}_front": point in best for measure, best in fronts.items()}}
        for point in sorted(points, key=lambda p: (*p.series, p.l0))
    ]


def chart(points: Sequence[Point], measure: Measure) -> Markup:
    """L0 (log scale) against a measure: a line a series, filled marks and a dashed step line for the front.

    Empty if no point has the measure.
    """
    known = [point for point in points if getattr(point, measure) is not None]
    if not known:
        return Markup("")
    series = sorted({point.series for point in known})
    best = front(known, measure)
    name = "FVU (lower is better)" if measure == "fvu" else "CE recovered (higher is better)"
    names = [_series_name(key, series) for key in series]
    columns = 2 if max(map(len, names)) <= 20 else 1
    draw = Drawing(400, 316 + 18 * -(-len(series) // columns), f"L0 against {name}")
    x, y = _axes([p.l0 for p in known], [getattr(p, measure) for p in known], measure)
    form = "{}" if measure == "fvu" else "{}\N{NO-BREAK SPACE}%"
    times = 1 if measure == "fvu" else 100
    draw.y_axis(y, (_LEFT, _RIGHT), name, [(v, form.format(numbers.number(times * v))) for v in y.ticks()])
    draw.x_axis(x, _FLOOR + 6, "L0: latents a token, log scale", apart(x, [(v, numbers.number(v)) for v in x.ticks(6)]))
    at = {id(p): (x.at(p.l0), y.at(getattr(p, measure))) for p in known}
    draw.line(_steps([at[id(p)] for p in best]), "base")
    for i, key in enumerate(series):
        kind = KINDS[i % len(KINDS)]
        members = sorted((p for p in known if p.series == key), key=lambda p: p.l0)
        draw.curve([at[id(p)] for p in members], kind)
        for p in members:
            draw.mark(*at[id(p)], kind if p in best else f"{kind} hollow", title=_title(p), size=4.5)
        _legend(draw, i, columns, kind, names[i])
    for p in best:
        draw.label(*at[id(p)], f"k {p.k}", "muted", Box(_LEFT + 2, 16, _RIGHT + 4, _FLOOR - 2))
    return draw.svg()


def _axes(across: Sequence[float], upwards: Sequence[float], measure: Measure) -> tuple[Axis, Axis]:
    """Room around the points, and for FVU down to 0; a share of the loss is shown up to 1."""
    x = Axis(min(across) / 1.15, max(across) * 1.15, _LEFT + 8, _RIGHT - 8, log=True)
    if measure == "fvu":
        return x, Axis(0, max(upwards) * 1.12 or 1, _FLOOR, _TOP)
    spread = max(1 - min(upwards), 0.01)
    return x, Axis(min(upwards) - 0.12 * spread, max(1.0, *upwards), _FLOOR, _TOP)


def _steps(path: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A front holds up to the next of its points."""
    found = [path[0]]
    for x, y in path[1:]:
        found += [(x, found[-1][1]), (x, y)]
    return found


def _series_name(key: tuple[int, str, str], series: Sequence[tuple[int, str, str]]) -> str:
    """The width, and what else tells the series apart."""
    width, *others = key
    varied = [part for i, part in enumerate(others, 1) if len({one[i] for one in series}) > 1]
    return ", ".join([f"{width:,} latents", *varied])


def _legend(draw: Drawing, place: int, columns: int, kind: str, name: str) -> None:
    """One entry, under the chart."""
    left, top = _LEFT + 4 + (place % columns) * 176, 320 + 18 * (place // columns)
    draw.mark(left, top, kind, size=4.5)
    draw.text(left + 12, top + 4, name, anchor="start")


def _title(point: Point) -> str:
    parts = [f"{point.name}: k {point.k}, L0 {numbers.number(point.l0)}, FVU {numbers.number(point.fvu)}"]
    if point.ce_recovered is not None:
        parts.append(f"CE recovered {numbers.percent(point.ce_recovered)}")
    return ", ".join([*parts, *([] if point.dead is None else [f"dead {numbers.percent(point.dead)}"])])


def render(points: Sequence[Point]) -> str:
    """A page with both charts and the table, which needs no network. DataError without a point."""
    if not points:
        raise DataError("there is no SAE to compare: name at least one run")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=numbers.number, percent=numbers.percent)
    return environment.get_template("pareto.html").render(
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        rows=rows(points),
        charts=[drawn for measure in ("fvu", "ce_recovered") if (drawn := chart(points, measure))],
    )


def write_pareto(points: Sequence[Point], out: Path) -> Path:
    """Write the page, whole or not at all. DataError without a point."""
    write_text(out, render(points))
    return out
