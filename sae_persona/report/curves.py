"""A sweep as two charts: the judged rate by strength, and by what it costs."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from markupsafe import Markup

from sae_persona.attribution.association import Interval
from sae_persona.report.numbers import percent, strength, times
from sae_persona.report.svg import Axis, Box, Drawing, apart
from sae_persona.report.verdict import find
from sae_persona.steering.arms import Arm, Sweep

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_HEIGHT, _TOP, _FLOOR = 330, 30, 272
_WIDTH, _LEFT, _RIGHT = 400, 46, 396
_COLUMNS = {"wrong": 42.0, "random": 54.0, "dense": 64.0, "prompt": 50.0}
"""Widths of the controls' columns."""


def _known(*intervals: Interval) -> bool:
    return all(math.isfinite(interval.value) for interval in intervals)


def _clamps(swept: Sweep) -> list[Arm]:
    arms = [arm for arm in swept.arms if arm.part == "test" and arm.kind == "latent" and _known(arm.rate, arm.cost)]
    return sorted(arms, key=lambda arm: arm.strength or 0)


def _controls(swept: Sweep) -> list[tuple[str, tuple[str, str], list[Arm]]]:
    """Kind, name in two lines, and arms of each control that the sweep has."""
    dense, prompt = find(swept, "difference of means"), find(swept, "prompt")
    found = [
        ("random", ("random", "latents"), swept.randoms),
        ("dense", ("difference", "of means"), [dense] if dense else []),
        ("prompt", ("prompt", ""), [prompt] if prompt else []),
    ]
    known = [(kind, name, [arm for arm in arms if _known(arm.rate, arm.cost)]) for kind, name, arms in found]
    return [part for part in known if part[2]]


def _wrong_sign(swept: Sweep) -> list[tuple[str, tuple[str, str], list[Arm]]]:
    """As `_controls`. Not for the chart of costs: what the wrong sign costs may be far off it."""
    arm = find(swept, "wrong sign")
    return [("wrong", ("wrong", "sign"), [arm])] if arm and _known(arm.rate) else []


def _board(title: str) -> tuple[Drawing, Axis]:
    """A drawing with the judged rate upwards."""
    draw, y = Drawing(_WIDTH, _HEIGHT, title), Axis(0, 1, _FLOOR, _TOP)
    draw.y_axis(y, (_LEFT, _RIGHT), "answers that show the persona", [(v, percent(v)) for v in _SHARES])
    return draw, y


def rate_by_strength(swept: Sweep) -> Markup:
    """Judged rate against strength on the left, the controls' rates in columns on the right; 95 % intervals."""
    clamps, base, controls = _clamps(swept), find(swept, "baseline"), [*_wrong_sign(swept), *_controls(swept)]
    if not clamps or base is None or not _known(base.rate):
        return Markup("")
    draw, y = _board(f"Judged rate of {swept.persona} against the strength of the clamp")
    end = _RIGHT - sum(_COLUMNS[kind] for kind, _, _ in controls)
    x = Axis(0, max(arm.strength or 0 for arm in clamps) * 1.06, _LEFT + 8, end - 6)
    names = [(0.0, "off"), *((arm.strength or 0.0, f"{arm.strength:g}") for arm in clamps)]
    draw.x_axis(x, _FLOOR + 6, "clamp, × p99.9", apart(x, names))
    draw.line([(_LEFT, y.at(base.rate.value)), (_RIGHT, y.at(base.rate.value))], "base")
    draw.take(_LEFT, y.at(base.rate.value) - 1, _RIGHT, y.at(base.rate.value) + 1)
    path = [(x.at(s), y.at(r)) for s, r in _path(clamps, base, lambda arm: arm.strength or 0.0)]
    draw.curve(path)
    _mark(draw, x.at(0), y, base, "baseline")
    for arm in clamps:
        _clamp_mark(draw, x.at(arm.strength or 0), y, arm, swept)
    left = end
    for kind, name, arms in controls:
        _column(draw, left + _COLUMNS[kind] / 2, y, kind, name, arms)
        left += _COLUMNS[kind]
    area = Box(_LEFT + 2, 16, end, _FLOOR - 2)
    draw.label(x.at(swept.strength), y.at(swept.chosen.rate.value), percent(swept.chosen.rate.value), "latent", area)
    draw.label(*path[-1], f"latent {swept.latent}", "latent", area)
    draw.label(end, y.at(base.rate.value), f"baseline {percent(base.rate.value)}", "muted", area)
    return draw.svg()


def _column(draw: Drawing, at: float, y: Axis, kind: str, name: Sequence[str], arms: Sequence[Arm]) -> None:
    """One control's rates beside each other; the rate in words if it is one."""
    for line, word in enumerate(name):
        draw.text(at, _FLOOR + 23 + 15 * line, word, f"tick {kind}")
    for i, arm in enumerate(arms):
        _mark(draw, at + (i - (len(arms) - 1) / 2) * min(10, 48 / len(arms)), y, arm, kind)
    if len(arms) == 1:
        area = Box(at - 40, 16, _WIDTH + 4, _FLOOR + 2)
        draw.label(at, y.at(arms[0].rate.value), percent(arms[0].rate.value), kind, area)


def cost_range(swept: Sweep) -> tuple[float, float]:
    """Perplexity ratios that the cost chart shows: the limit, the chosen clamp and every control lie inside."""
    shown = [swept.chosen, *(arm for _, _, arms in _controls(swept) for arm in arms)]
    costs = [arm.cost.value for arm in shown if math.isfinite(arm.cost.value)]
    return min([0.95, *costs]) / 1.03, max([swept.config.get("max_cost", 1.5), 1.2, *costs]) * 1.12


def off_chart(swept: Sweep) -> list[Arm]:
    """Clamps that cost more than the cost chart shows."""
    return [arm for arm in _clamps(swept) if arm.cost.value > cost_range(swept)[1]]


def rate_by_cost(swept: Sweep) -> Markup:
    """Judged rate against perplexity over the baseline's (log scale), with 95 % intervals both ways."""
    clamps, base = _clamps(swept), find(swept, "baseline")
    if not clamps or base is None or not _known(base.rate):
        return Markup("")
    draw, y = _board(f"Judged rate of {swept.persona} against its cost in perplexity")
    x = Axis(*cost_range(swept), _LEFT + 6, _RIGHT - 4, log=True)
    draw.x_axis(x, _FLOOR + 6, "perplexity, × the baseline's (log)", apart(x, [(v, strength(v)) for v in x.ticks(6)]))
    limit = swept.config.get("max_cost", math.inf)
    if limit < x.high:
        draw.line([(x.at(limit), _TOP), (x.at(limit), _FLOOR)], "limit")
    path = _cut(_path(clamps, base, lambda arm: math.log(arm.cost.value)), math.log(x.high))
    draw.curve([(x.at(math.exp(c)), y.at(r)) for c, r in path])
    _mark(draw, x.at(1), y, base, "baseline", whisker=False)
    labels = _cost_marks(draw, x, y, swept, [arm for arm in clamps if arm.cost.value <= x.high])
    area = Box(_LEFT + 2, 16, _RIGHT + 2, _FLOOR - 2)
    for arm, text, kind in labels:
        draw.label(x.at(arm.cost.value), y.at(arm.rate.value), text, kind, area)
    if limit < x.high:
        draw.label(x.at(limit), _TOP + 8, f"limit {strength(limit)}", "muted", area)
    return draw.svg()


def _cost_marks(draw: Drawing, x: Axis, y: Axis, swept: Sweep, clamps: Sequence[Arm]) -> list[tuple[Arm, str, str]]:
    """Draw every arm; returns what to write beside which, most important first."""
    labels: list[tuple[Arm, str, str]] = []
    for kind, name, arms in _controls(swept):
        for arm in arms:
            _cost_whisker(draw, x, y, arm, kind)
            _mark(draw, x.at(arm.cost.value), y, arm, kind)
        labels.append((max(arms, key=lambda arm: arm.cost.value), " ".join(name).strip(), kind))
    for arm in clamps:
        _cost_whisker(draw, x, y, arm, "latent")
        _clamp_mark(draw, x.at(arm.cost.value), y, arm, swept)
        is_chosen = arm.strength == swept.strength
        name = f"latent at {arm.strength:g}" if is_chosen else f"{arm.strength:g}"
        labels.append((arm, name, "latent"))
    return sorted(labels, key=lambda label: (label[2] == "random", label[1][0].isdigit(), label[2] != "latent"))


def _cost_whisker(draw: Drawing, x: Axis, y: Axis, arm: Arm, kind: str) -> None:
    at = y.at(arm.rate.value)
    draw.whisker((x.at(arm.cost.low), x.at(arm.cost.high)), (at, at), kind)


def _path(clamps: Sequence[Arm], base: Arm, place: Callable[[Arm], float]) -> list[tuple[float, float]]:
    return [(0.0, base.rate.value), *((place(arm), arm.rate.value) for arm in clamps)]


def _cut(path: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """A path up to where it first passes ``end``."""
    kept = [path[0]]
    for (x0, y0), (x1, y1) in pairwise(path):
        if x1 > end:
            return [*kept, (end, y0 + (y1 - y0) * (end - x0) / (x1 - x0))]
        kept.append((x1, y1))
    return kept


def _mark(draw: Drawing, x: float, y: Axis, arm: Arm, kind: str, *, whisker: bool = True) -> None:
    if whisker:
        draw.whisker((x, x), (y.at(arm.rate.low), y.at(arm.rate.high)), kind.split()[0])
    draw.mark(x, y.at(arm.rate.value), kind, title=_title(arm))


def _clamp_mark(draw: Drawing, x: float, y: Axis, arm: Arm, swept: Sweep) -> None:
    """Filled if it was chosen."""
    draw.whisker((x, x), (y.at(arm.rate.low), y.at(arm.rate.high)), "latent")
    is_chosen = arm.strength == swept.strength
    kind, size = ("latent", 6.0) if is_chosen else ("latent hollow", 4.0)
    draw.mark(x, y.at(arm.rate.value), kind, title=_title(arm), size=size)


def _title(arm: Arm) -> str:
    name = arm.kind + (f" {arm.latent}" if arm.latent is not None else "")
    name += f" at {arm.strength:g}" if arm.strength is not None else ""
    return f"{name}: {percent(arm.rate.value)}, perplexity {times(arm.cost.value)}"
