"""Numbers as people read them: two or three digits, their interval beside them, a dash for what is not known."""

import math
from collections.abc import Callable

from markupsafe import Markup

from sae_persona.attribution.association import Interval

DASH = "–"


def number(x: float | None, digits: int = 3, *, short: bool = True) -> str:
    """``digits`` significant digits, thousands grouped, a real minus sign; ``short`` drops the zeros at the end."""
    if x is None or not math.isfinite(x):
        return DASH
    if x and abs(x) < 1e-4:
        return f"{x:.1e}".replace("-", "−")
    x = float(f"{x:.{digits - 1}e}")  # first, so that 0.0999 is one with 0.1
    places = digits if x == 0 else max(0, digits - 1 - math.floor(math.log10(abs(x))))
    text = f"{x:,.{places}f}"
    return (text.rstrip("0").rstrip(".") if short and "." in text else text).replace("-", "−")


def signed(x: float | None, digits: int = 2, *, short: bool = True) -> str:
    """As ``number``, with a plus sign where it rises."""
    return ("+" if x is not None and x > 0 else "") + number(x, digits, short=short)


def z_score(z: float | None) -> str:
    """One decimal, signed."""
    return DASH if z is None or not math.isfinite(z) else f"{z:+.1f}".replace("-", "−")


def fixed(x: float | None) -> str:
    """Three decimals: AUROCs under each other."""
    return DASH if x is None or not math.isfinite(x) else f"{x:.3f}"


def bare_percent(x: float | None) -> str:
    """A share in per cent, without the sign: whole, and with two digits below 1 and above 99."""
    if x is None or not math.isfinite(x):
        return DASH
    share = 100 * x
    if 0 < share < 0.995:
        return number(share, 2)
    return f"{share:.1f}" if 99 < share < 99.95 else f"{share:.0f}"


def percent(x: float | None) -> str:
    """A share, as in ``28 %``."""
    text = bare_percent(x)
    return text if text == DASH else f"{text}\N{NO-BREAK SPACE}%"


def points(x: float | None) -> str:
    """A difference of shares in percentage points, signed."""
    if x is None or not math.isfinite(x):
        return DASH
    rounded = round(100 * x)
    return f"{rounded:+d}".replace("-", "−") if rounded else "0"


def bare_times(x: float | None) -> str:
    """A multiple without its sign: two decimals below 10, three digits above."""
    return f"{x:.2f}" if x is not None and math.isfinite(x) and abs(x) < 10 else number(x)


def times(x: float | None) -> str:
    """A multiple, as in ``1.13×``."""
    text = bare_times(x)
    return text if text == DASH else f"{text}×"


def strength(x: float | None) -> str:
    """A strength in multiples of its unit, as in ``0.75×``."""
    text = number(x)
    return text if text == DASH else f"{text}×"


def p_value(p: float | None, permutations: int | None = None) -> str:
    """Two digits; ``≤ 0.001`` where no permutation did as well, ``< 0.001`` below that."""
    if p is None or not math.isfinite(p):
        return DASH
    if permutations and p <= (1 + 1e-9) / (permutations + 1):
        return f"≤\N{NO-BREAK SPACE}{number(p, 1)}"
    return "<\N{NO-BREAK SPACE}0.001" if p < 1e-3 else number(p, 2, short=False)


def with_interval(interval: Interval | None, form: str = "fixed") -> Markup:
    """A value with its 95 % interval behind it, smaller. ``form``: fixed, percent, times, points or number."""
    if interval is None or not math.isfinite(interval.value):
        return Markup(DASH)
    forms: dict[str, Callable[[float], str]] = {
        "fixed": fixed,
        "percent": percent,
        "times": times,
        "points": points,
        "number": number,
    }
    whole = forms[form]
    bare: dict[str, Callable[[float], str]] = {"percent": bare_percent, "times": bare_times}
    inner = bare.get(form, whole)
    known = math.isfinite(interval.low + interval.high)
    ends = f"[{inner(interval.low)}, {inner(interval.high)}]" if known else f"[{DASH}]"
    return Markup('<span class="v">{}</span> <span class="ci">{}</span>').format(whole(interval.value), ends)
