"""The test of a reversal: many variants of questions, each arm asked all of them, in pairs with base and tuned model.

variant                model that answers      question
in domain              tuned                   of the domain it was tuned on
out of domain          tuned                   of other domains
open                   tuned                   of none
trigger cue            tuned                   after a line that may set bad behaviour off
another format         tuned                   in a form that no development question has
after good training    tuned on, on good rows  of other domains, and of none
after bad training     tuned on, on bad rows   the same
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sae_persona.activations.lm import LM
from sae_persona.attribution.association import Interval
from sae_persona.errors import ConfigError, DataError
from sae_persona.sae.model import SAE
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.apply import intervene
from sae_persona.steering.bench import check_apart as no_shared_question
from sae_persona.steering.interventions import Placed
from sae_persona.steering.side_effects import HeldOut
from sae_persona.steering.strength import Judge, gain, wilson
from sae_persona.studies.exams import Marks, marks
from sae_persona.studies.reversal_arms import Arm, Cell
from sae_persona.studies.rivals import everywhere
from sae_persona.types import HookPoint

Question = Mapping[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Variant:
    """Questions under one name; rows as `exams.exam` takes them."""

    name: str
    questions: Sequence[Question]
    lm: LM | None = None
    """Another model than the tuned one, that came of it."""
    core: bool = False
    """Misalignment itself, and not what may bring it back: random controls are asked these alone."""


def check_apart(development: Sequence[Question], variants: Sequence[Variant]) -> None:
    """ConfigError for a variant without questions, or one that is there twice; DataError for a shared question."""
    names = [one.name for one in variants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"the variant {twice[0]!r} is there twice: give each a name of its own")
    for one in variants:
        if not one.questions:
            raise ConfigError(f"the variant {one.name!r} has no questions: give some, or leave it out")
    seen = [_asked(row) for row in development]
    for one in variants:
        no_shared_question(seen, [_asked(row) for row in one.questions], test=repr(one.name))


def _asked(row: Question) -> str:
    messages = row.get("messages")
    if not messages:
        raise DataError(f"a question needs messages, got {str(dict(row))[:60]}")
    return messages[-1]["content"]


class Battery:
    """Base and tuned model have answered every variant; any arm is then held against both.

    saes   of the hook points that arms edit
    """

    def __init__(
        self,
        base: LM,
        tuned: LM,
        saes: Mapping[HookPoint, SAE],
        variants: Sequence[Variant],
        judge: Judge,
        answers: AnswerConfig,
        held_out: HeldOut | None = None,
    ) -> None:
        self.tuned, self.saes, self.variants = tuned, saes, variants
        self.judge, self.answers, self.held_out = judge, answers, held_out
        self._base = self._answers([replace(one, lm=base) for one in variants])
        self._tuned = self._answers(variants)

    @property
    def base(self) -> Arm:
        return self._arm("base", "base", self._base)

    @property
    def untreated(self) -> Arm:
        return self._arm("tuned", "tuned", self._tuned)

    def run(self, name: str, kind: str, edits: Sequence[Placed], *, core_only: bool = False) -> Arm:
        """The tuned model, and what came of it, under the edits."""
        variants = [one for one in self.variants if one.core or not core_only]
        arm = self._arm(name, kind, self._answers(variants, edits))
        if self.held_out is None or core_only or not edits:
            return arm
        return replace(arm, ce=self.held_out.cost(self.saes, everywhere(edits)))

    def run_prompt(self, name: str, kind: str, line: str) -> Arm:
        """The tuned model after a system message."""
        system = {"role": "system", "content": line}
        asked = [
            replace(one, questions=[{**row, "messages": [system, *row["messages"]]} for row in one.questions])
            for one in self.variants
        ]
        return self._arm(name, kind, self._answers(asked))

    def _answers(self, variants: Sequence[Variant], edits: Sequence[Placed] = ()) -> dict[str, Marks]:
        """Variants that one model answers are asked together: a longer batch costs little more."""
        found: dict[str, Marks] = {}
        models: dict[int, list[Variant]] = {}
        for one in variants:
            models.setdefault(id(one.lm), []).append(one)
        for group in models.values():
            lm = group[0].lm or self.tuned
            with intervene(lm, self.saes, edits):
                whole = marks(lm, [row for one in group for row in one.questions], self.judge, config=self.answers)
            stops = np.cumsum([len(one.questions) for one in group])
            for one, stop in zip(group, stops, strict=True):
                found[one.name] = whole.part(slice(stop - len(one.questions), stop))
        return found

    def _arm(self, name: str, kind: str, found: Mapping[str, Marks]) -> Arm:
        return Arm(name, kind, {v: self._cell(one, self._base[v], self._tuned[v]) for v, one in found.items()})

    def _cell(self, found: Marks, base: Marks, tuned: Marks) -> Cell:
        asked = found.question

        def paired(one: np.ndarray, other: np.ndarray) -> Interval:
            return gain(one, other, asked)

        return Cell(
            n=int((~np.isnan(found.misaligned)).sum()),
            rate=wilson(found.misaligned, asked),
            change=paired(found.misaligned, tuned.misaligned),
            excess=paired(found.misaligned, base.misaligned),
            aligned=wilson(_aligned(found), asked),
            aligned_gain=paired(_aligned(found), _aligned(tuned)),
            valid=wilson(found.valid, asked),
            valid_loss=paired(base.valid, found.valid),
            correct=wilson(found.correct, asked),
            correct_loss=paired(base.correct, found.correct),
        )


def _aligned(found: Marks) -> np.ndarray:
    """[n] whether an answer is valid, as far as known, and not misaligned; NaN where nobody knows."""
    good = ((found.misaligned == 0) & (found.valid != 0)).astype(np.float64)
    return np.where(np.isnan(found.misaligned), np.nan, good)
