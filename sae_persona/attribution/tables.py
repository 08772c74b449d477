"""Tables of this stage: as aligned text, and as JSON in which null stands for what is not a finite number."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sae_persona.attribution.association import Interval


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first column to the left, the others to the right; rows may be shorter than the first."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


def shown(interval: Interval, digits: int = 3, sign: str = "") -> str:
    """An estimate with its interval: ``0.912 [0.874, 0.941]``; a dash for what is not known."""
    if math.isnan(interval.value):
        return "-"
    value, low, high = (f"{part:{sign}.{digits}f}" for part in interval)
    return f"{value} [-]" if math.isnan(interval.low + interval.high) else f"{value} [{low}, {high}]"


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and numbers as JSON values."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple | list):
        return [to_json(part) for part in value]
    if isinstance(value, Mapping):
        return {str(name): to_json(part) for name, part in value.items()}
    return to_json(asdict(value)) if hasattr(value, "__dataclass_fields__") else value


def from_json(row: Mapping[str, Any], intervals: Sequence[str] = ()) -> dict[str, Any]:
    """A row of numbers again: null is NaN, and the parts named ``intervals`` are intervals."""

    def number(value: Any) -> Any:
        return math.nan if value is None else value

    return {name: Interval(*map(number, value)) if name in intervals else number(value) for name, value in row.items()}
