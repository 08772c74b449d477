"""A reversal certificate as charts: every arm, every variant, and the dose curve of the same latents in the base."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from sae_persona.report.numbers import percent
from sae_persona.report.svg import Axis, Box, Drawing, apart
from sae_persona.studies.certificate import Certificate
from sae_persona.studies.induce import Induction
from sae_persona.studies.reversal_arms import Arm, Cell

KINDS = {
    "base": "baseline", "tuned": "baseline", "chosen": "latent", "ablated": "latent hollow", "capped": "latent hollow",
    "difference of means": "dense", "prompt": "prompt", "wrong sign": "wrong", "random latents": "random",
    "random directions": "random",
}  # fmt: skip
"""Of an arm: what its mark looks like."""
DRAWN = ("random latents", "random directions")
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_LEFT, _RIGHT, _ROW, _TOP = 236, 480, 25, 26


def _rows_of(arms: Sequence[Arm], variant: str) -> list[tuple[str, list[Arm]]]:
    """Arms as rows of a chart: draws of one kind share one."""
    rows: dict[str, list[Arm]] = {}
    for arm in arms:
        if variant in arm.cells and not math.isnan(arm.cells[variant].rate.value):
            rows.setdefault(arm.kind if arm.kind in DRAWN else arm.name, []).append(arm)
    return list(rows.items())


def _board(n: int, title: str) -> tuple[Drawing, Axis, float]:
    floor = _TOP + n * _ROW
    draw, x = Drawing(500, floor + 44, title), Axis(0, 1, _LEFT, _RIGHT)
    for share in _SHARES:
        draw.line([(x.at(share), _TOP - 8), (x.at(share), floor)], "grid")
    draw.x_axis(x, floor, "misaligned answers", [(v, percent(v)) for v in _SHARES])
    return draw, x, floor


def _mark(draw: Drawing, x: Axis, y: float, cell: Cell, kind: str, name: str, *, whisker: bool = True) -> None:
    if whisker:
        draw.whisker((x.at(cell.rate.low), x.at(cell.rate.high)), (y, y), kind.split()[0])
    draw.mark(x.at(cell.rate.value), y, kind, title=f"{name}: {percent(cell.rate.value)}")


def arms_chart(made: Certificate, variant: str) -> Markup:
    """The misaligned share of every arm on one variant, with 95 % intervals; draws are dots of one row."""
    rows = _rows_of(made.arms, variant)
    draw, x, floor = _board(len(rows), f"Misaligned answers by arm, {variant}")
    bound = made.arm("base").cells[variant].rate.value + made.bounds.reach
    draw.line([(x.at(bound), _TOP - 8), (x.at(bound), floor)], "limit")
    for i, (name, arms) in enumerate(rows):
        y = _TOP + (i + 0.5) * _ROW - 4
        kind = KINDS[arms[0].kind]
        draw.text(_LEFT - 10, y + 4, name, f"tick {kind.split()[0]}", "end")
        for arm in arms:
            _mark(draw, x, y, arm.cells[variant], kind, arm.name, whisker=len(arms) == 1)
    return draw.svg()


def variants_chart(made: Certificate) -> Markup:
    """Each variant: the base, the tuned model and the chosen edit."""
    names = [name for name in made.variants if not math.isnan(made.arm("chosen").cells[name].rate.value)]
    draw, x, _ = _board(len(names), "Misaligned answers by variant")
    for i, name in enumerate(names):
        y = _TOP + (i + 0.5) * _ROW - 4
        draw.text(_LEFT - 10, y + 4, name, "tick", "end")
        for kind, look, shift in (("base", "faint", -6), ("tuned", "baseline", 0), ("chosen", "latent", 6)):
            _mark(draw, x, y + shift, made.arm(kind).cells[name], look, kind)
    return draw.svg()


def dose_chart(found: Induction) -> Markup:
    """The base's misaligned share by dose: a curve for each part, and the random latents' shares as grey dots."""
    parts = [name for name in ("out of domain", "open", "in domain") if name in found.doses[0].rates][:2]
    draw = Drawing(400, 330, "Misaligned answers of the base by dose")
    x, y = Axis(0, found.doses[-1].dose * 1.04, 52, 392), Axis(0, 1, 272, 30)
    draw.y_axis(y, (46, 396), "misaligned answers of the base", [(v, percent(v)) for v in _SHARES])
    names = [(one.dose, f"{one.dose:g}") for one in found.doses]
    draw.x_axis(x, 278, "clamp, × 90th percentile", apart(x, names))
    known = [(x.at(one.dose), y.at(one.valid.value)) for one in found.doses if not math.isnan(one.valid.value)]
    if known:
        draw.line(known, "base")
    for one in found.doses:
        for share in one.random.get(parts[0], ()):
            if not math.isnan(share):
                draw.mark(x.at(one.dose), y.at(share), "random", title=f"random latents: {percent(share)}", size=3)
    for name, kind in zip(parts, ("latent", "dense"), strict=False):
        shown = [one for one in found.doses if not math.isnan(one.rates[name].value)]
        draw.curve([(x.at(one.dose), y.at(one.rates[name].value)) for one in shown], kind)
        for one in shown:
            rate, at = one.rates[name], x.at(one.dose)
            draw.whisker((at, at), (y.at(rate.low), y.at(rate.high)), kind)
            draw.mark(at, y.at(rate.value), kind, title=f"{name}, dose {one.dose:g}: {percent(rate.value)}")
    area = Box(48, 16, 398, 270)
    for name, kind in zip(parts, ("latent", "dense"), strict=False):
        last = found.doses[-1]
        draw.label(x.at(last.dose), y.at(last.rates[name].value), name, kind, area)
    if known:
        draw.label(*known[len(known) // 2], "valid answers", "muted", area)
    return draw.svg()
