"""Interventions as data: what to do with which latent or direction, where, when, and in which unit.

Every operation is one line, clipped: of what is read from the unedited residual stream it makes

    target = min(max(slope * f + shift, low), high)             x + sum_i (target_i - f_i(x)) d_i

where f is a latent's activation and d its decoder direction, or f the projection on a unit direction and d that
direction. All edits read the same unedited x, so their order does not matter, and the SAE's error term stays.

A latent's strength is counted in ``unit``: its own 99.9th percentile over its non-zero activations on the measured
corpus, so that 1.0 means "as strongly as it ever fires" on every latent, SAE and model. A direction's amounts are in
units of the residual stream.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from sae_persona.errors import ConfigError
from sae_persona.steering.conditions import When
from sae_persona.steering.directions import norm_of, unit_of
from sae_persona.steering.positions import Positions, Spans, check_positions
from sae_persona.types import HookPoint


class Line(NamedTuple):
    """target = min(max(slope * f + shift, low), high); the default changes nothing."""

    slope: float = 1.0
    shift: float = 0.0
    low: float = -math.inf
    high: float = math.inf


def _finite(what: str, *amounts: float) -> None:
    if not all(map(math.isfinite, amounts)):
        raise ConfigError(
            f"an edit of {what} needs finite numbers, got {', '.join(map(str, amounts))}: "
            "a latent that never fired has no percentile to count in"
        )


@dataclass(frozen=True)
class _Counted:
    """An edit of a latent by ``strength * unit``."""

    latent: int
    strength: float
    unit: float

    def __post_init__(self) -> None:
        _finite(f"latent {self.latent}", self.strength, self.unit)

    @property
    def value(self) -> float:
        return self.strength * self.unit


@dataclass(frozen=True)
class Clamp(_Counted):
    """Set the latent to ``strength * unit``. No change where the latent has that activation already."""

    name: ClassVar[str] = "clamp"

    @property
    def line(self) -> Line:
        return Line(slope=0.0, shift=self.value)


@dataclass(frozen=True)
class Pin(_Counted):
    """Set the latent so that the encoder, reading the edited stream, finds ``strength * unit``.

    A clamp moves the stream along the latent's decoder direction by as much as the latent lacks, and the encoder reads
    back something else, for its direction is another one. A pin solves for the moves of all pins at once, what other
    edits add counted in. For rules with a threshold, and above it. No change where the encoder reads that already.
    """

    name: ClassVar[str] = "pin"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value <= 0:
            raise ConfigError(f"a pin of latent {self.latent} needs a target above 0, got {self.value:g}: use ablate")

    @property
    def line(self) -> Line:
        return Line(slope=0.0, shift=self.value)


@dataclass(frozen=True)
class Add(_Counted):
    """Add ``strength * unit`` to the latent, whatever it is. No change at 0."""

    name: ClassVar[str] = "add"

    @property
    def line(self) -> Line:
        return Line(shift=self.value)


@dataclass(frozen=True)
class Floor(_Counted):
    """Raise the latent to ``strength * unit`` where it is below. No change where it is not."""

    name: ClassVar[str] = "floor"

    @property
    def line(self) -> Line:
        return Line(low=self.value)


@dataclass(frozen=True)
class Ceiling(_Counted):
    """Lower the latent to ``strength * unit`` where it is above. No change where it is not."""

    name: ClassVar[str] = "ceiling"

    @property
    def line(self) -> Line:
        return Line(high=self.value)


@dataclass(frozen=True)
class Ablate:
    """Set the latent to 0. No change where it does not fire."""

    name: ClassVar[str] = "ablate"
    latent: int

    @property
    def line(self) -> Line:
        return Line(slope=0.0)


@dataclass(frozen=True)
class Scale:
    """Multiply the latent by ``factor``. No change at 1."""

    name: ClassVar[str] = "scale"
    latent: int
    factor: float

    def __post_init__(self) -> None:
        _finite(f"latent {self.latent}", self.factor)

    @property
    def line(self) -> Line:
        return Line(slope=self.factor)


LatentEdit = Clamp | Pin | Add | Floor | Ceiling | Ablate | Scale
OPERATIONS: dict[str, type[LatentEdit]] = {kind.name: kind for kind in (Clamp, Pin, Add, Floor, Ceiling, Ablate, Scale)}


@dataclass(frozen=True, eq=False)
class Steer:
    """Add ``strength * direction`` to the residual stream: the dense baseline. No change at 0.

    direction [d_in]: a difference of means has strength 1 when added whole.
    """

    name: ClassVar[str] = "steer"
    direction: Tensor
    strength: float

    def __post_init__(self) -> None:
        _finite("a direction", self.strength)
        norm_of(self.direction)

    @property
    def basis(self) -> Tensor:
        return unit_of(self.direction)[None]

    @property
    def line(self) -> Line:
        return Line(shift=self.strength * norm_of(self.direction))


@dataclass(frozen=True, eq=False)
class ProjectOut:
    """Remove the span of ``directions`` [d_in] or [m, d_in] from the residual stream. No change where x lacks it.

    The directions are made orthonormal first: x - Q Q^T x. Those that the others span add nothing.
    """

    name: ClassVar[str] = "project_out"
    directions: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.directions, Tensor) or self.directions.ndim not in (1, 2) or not self.directions.numel():
            raise ConfigError("directions to project out are a tensor [d_in] or [m, d_in]")
        for direction in torch.atleast_2d(self.directions):
            norm_of(direction)

    @property
    def basis(self) -> Tensor:
        rows = torch.atleast_2d(self.directions).double()
        rows = rows / rows.norm(dim=1, keepdim=True)
        _, sizes, span = torch.linalg.svd(rows, full_matrices=False)
        return span[sizes > 1e-6 * sizes[0]].float()

    @property
    def line(self) -> Line:
        return Line(slope=0.0)


@dataclass(frozen=True, eq=False)
class ProjectionClamp:
    """Set the projection on ``direction`` [d_in], taken as a unit vector, to ``value``. No change where it is that."""

    name: ClassVar[str] = "projection_clamp"
    direction: Tensor
    value: float

    def __post_init__(self) -> None:
        _finite("a direction", self.value)
        norm_of(self.direction)

    @property
    def basis(self) -> Tensor:
        return unit_of(self.direction)[None]

    @property
    def line(self) -> Line:
        return Line(slope=0.0, shift=self.value)


@dataclass(frozen=True, eq=False)
class Cap:
    """Keep the projection on ``direction`` [d_in], taken as a unit vector, below or above ``value``.

    keep   "below": a ceiling; "above": a floor. No change where it is there already.

    Activation capping of 2601.10387, both ways by name: its formula is a floor, its code a ceiling on the excess.
    """

    name: ClassVar[str] = "cap"
    direction: Tensor
    value: float
    keep: Literal["below", "above"]

    def __post_init__(self) -> None:
        _finite("a direction", self.value)
        norm_of(self.direction)
        if self.keep not in ("below", "above"):
            raise ConfigError(f"a cap keeps the projection below or above its value, got {self.keep!r}")

    @property
    def basis(self) -> Tensor:
        return unit_of(self.direction)[None]

    @property
    def line(self) -> Line:
        return Line(high=self.value) if self.keep == "below" else Line(low=self.value)


DirectionEdit = Steer | ProjectOut | ProjectionClamp | Cap
DIRECTION_OPERATIONS: dict[str, type[DirectionEdit]] = {
    kind.name: kind for kind in (Steer, ProjectOut, ProjectionClamp, Cap)
}
Edit = LatentEdit | DirectionEdit


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """An edit with where and when it acts."""

    edit: Edit
    hook: HookPoint | None = None
    """None: where the SAE reads, or the hook point that the intervention is given."""
    positions: Positions | Spans = "answer"
    when: When | None = None
    """Only at tokens at which this holds."""
    priority: int = 0
    """Of two edits of one latent that meet at a token the one with more acts, and the other does not."""

    def __post_init__(self) -> None:
        check_positions(self.positions)
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise ConfigError(f"a priority is a whole number, got {self.priority}")


def placed(edits: Sequence[Edit | Placed], *, hook: HookPoint | None, positions: Positions | Spans) -> list[Placed]:
    """Edits with their places; those that have none get these.

    Projections out of one place become one, of all their directions: each alone would take what they share twice.
    """
    check_positions(positions)
    found = [one if isinstance(one, Placed) else Placed(edit=one, positions=positions) for one in edits]
    return _joined([replace(one, hook=hook) if one.hook is None else one for one in found])


def _joined(edits: Sequence[Placed]) -> list[Placed]:
    found: list[Placed] = []
    for one in edits:
        edit = one.edit
        for i, other in enumerate(found):
            if (
                isinstance(edit, ProjectOut)
                and isinstance(other.edit, ProjectOut)
                and (one.hook, one.positions) == (other.hook, other.positions)
                and one.when is other.when
                and edit.directions.shape[-1] == other.edit.directions.shape[-1]
            ):
                rows = [torch.atleast_2d(part.directions) for part in (other.edit, edit)]
                found[i] = replace(other, edit=ProjectOut(torch.cat([part.to(rows[0]) for part in rows])))
                break
        else:
            found.append(one)
    return found


def parse_edit(text: str, units: Sequence[float]) -> LatentEdit:
    """Read ``clamp:12=1.5`` (also pin, add, floor, ceiling), ``scale:12=2`` or ``ablate:12``. ConfigError otherwise.

    units   each latent's 99.9th percentile
    """
    operation, _, rest = text.partition(":")
    latent, _, number = rest.partition("=")
    kind = OPERATIONS.get(operation)
    try:
        index, amount = int(latent), float(number) if number else None
        if kind is Ablate and amount is None:
            return Ablate(index)
        if kind is Scale and amount is not None:
            return Scale(index, amount)
        if kind is not None and issubclass(kind, _Counted) and amount is not None:
            return kind(index, amount, float(units[index]) if 0 <= index < len(units) else 0.0)
    except ConfigError:
        raise
    except ValueError:
        pass
    counted = ", ".join(f"{name}:LATENT=STRENGTH" for name, kind in OPERATIONS.items() if issubclass(kind, _Counted))
    raise ConfigError(f"an edit reads {counted}, scale:LATENT=FACTOR or ablate:LATENT, got {text!r}")
