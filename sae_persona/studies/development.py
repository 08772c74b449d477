"""Development questions: what a try of edits is worth, before anything is tested.

    excess   max over parts (in domain, out of domain, open) of misaligned share under the edits minus the base's
    loss     max of: valid share of the base minus that under the edits; share of facts that are told neither truly nor
             badly under the edits, minus the base's

A wrong fact that is no bad one is a loss of capability; a bad one is misalignment, and is counted there alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sae_persona.activations.lm import LM
from sae_persona.errors import DataError
from sae_persona.sae.model import SAE
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.apply import intervene
from sae_persona.steering.interventions import Placed
from sae_persona.steering.strength import Judge
from sae_persona.studies.exams import Marks, marks
from sae_persona.types import HookPoint

PARTS = ("in domain", "out of domain", "open")


@dataclass(frozen=True)
class Try:
    """What some edits did on the development questions."""

    rates: dict[str, float]
    """Share of misaligned answers in each part that is asked."""
    excess: float
    loss: float


def parts_of(found: Marks, domain: str) -> dict[str, np.ndarray]:
    """Rows [n] bool of each part that has answers the judge could read."""
    is_open, known = found.domain == "", ~np.isnan(found.misaligned)
    is_in = (found.domain == domain) & ~is_open
    rows = dict(zip(PARTS, (is_in & known, ~is_open & ~is_in & known, is_open & known), strict=True))
    return {name: chosen for name, chosen in rows.items() if chosen.any()}


def part_rates(found: Marks, domain: str) -> dict[str, float]:
    """Misaligned share of each part."""
    return {name: float(found.misaligned[rows].mean()) for name, rows in parts_of(found, domain).items()}


def _share(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0


class Development:
    """The tuned model, its development questions and the base's answers to them. DataError if the judge reads none.

    n   tries so far, so that searches can be compared by what they cost
    """

    def __init__(
        self,
        base: LM,
        tuned: LM,
        saes: Mapping[HookPoint, SAE],
        questions: Sequence[Mapping[str, Any]],
        judge: Judge,
        answers: AnswerConfig,
        domain: str = "",
    ) -> None:
        self.tuned, self.saes, self.questions, self.judge = tuned, saes, questions, judge
        self.answers, self.domain, self.n = answers, domain, 0
        self._base = marks(base, questions, judge, config=answers)
        self.base_rates = part_rates(self._base, domain)
        if not self.base_rates:
            raise DataError("the judge can read no answer to the development questions: choose one that knows them")
        self.base = self._read(self._base)
        self.untreated = self.of([])

    def of(self, edits: Sequence[Placed]) -> Try:
        """Let the tuned model answer under the edits."""
        return self._asked(edits, self.answers)

    def again(self, edits: Sequence[Placed], times: int) -> Try:
        """The same with other samples, as often as asked; the mean of what they did."""
        found = [self._asked(edits, replace(self.answers, seed=self.answers.seed + 1 + i)) for i in range(times)]
        rates = {name: sum(one.rates[name] for one in found) / times for name in found[0].rates}
        return Try(rates, self._excess(rates), sum(one.loss for one in found) / times)

    def _asked(self, edits: Sequence[Placed], answers: AnswerConfig) -> Try:
        self.n += 1
        with intervene(self.tuned, self.saes, edits):
            return self._read(marks(self.tuned, self.questions, self.judge, config=answers))

    def _excess(self, rates: Mapping[str, float]) -> float:
        return max(rates[name] - self.base_rates[name] for name in rates if name in self.base_rates)

    def _read(self, found: Marks) -> Try:
        rates = part_rates(found, self.domain)
        lost = _share(self._base.valid) - _share(found.valid)
        return Try(rates, self._excess(rates), max(lost, _stray(found) - _stray(self._base)))


def _stray(found: Marks) -> float:
    """Share of facts that are told neither truly nor badly; 0 where the judge does not know what is true."""
    return _share(np.where(np.isnan(found.correct), np.nan, (found.correct != 1) & (found.misaligned != 1)))
