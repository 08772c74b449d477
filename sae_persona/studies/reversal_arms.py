"""What a reversal is measured by: arms, the variants of questions that each is asked, and the numbers of each."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from sae_persona.attribution.association import Interval

IN, OUT, OPEN, CUE, FORM, GOOD, BAD = (
    *("in domain", "out of domain", "open", "trigger cue", "another format"),
    *("after good training", "after bad training"),
)
STANDARD = (IN, OUT, OPEN, CUE, FORM, GOOD, BAD)
"""Variants that belong to a reversal; one that is not asked is named, and not passed."""


@dataclass(frozen=True)
class Cell:
    """One arm on one variant. Intervals are 95 %, over questions; those of differences are paired."""

    n: int
    rate: Interval
    """Share of misaligned answers."""
    change: Interval
    """The same minus the tuned model's."""
    excess: Interval
    """The same minus the base's."""
    aligned: Interval
    """Share of answers that are valid, as far as is known, and not misaligned: what breaks answers earns none."""
    aligned_gain: Interval
    """The same minus the tuned model's."""
    valid: Interval
    valid_loss: Interval
    """Below the base's."""
    correct: Interval
    """Share of facts told as they are; NaN where the judge does not know."""
    correct_loss: Interval


CELL_INTERVALS = tuple(field.name for field in fields(Cell) if field.name != "n")


@dataclass(frozen=True)
class Arm:
    """The tuned model under one treatment, by variant."""

    name: str
    kind: str
    """base, tuned, chosen, ablated, capped, wrong sign, random latents, random directions, difference of means or
    prompt."""
    cells: dict[str, Cell]
    ce: Interval | None = None
    """Cross entropy on held-out texts, edited at every token, minus the tuned model's, in nats; None: not read."""


def of_kind(arms: Sequence[Arm], kind: str) -> list[Arm]:
    """The arms of a kind, in their order."""
    return [one for one in arms if one.kind == kind]
