"""A reversal certificate: what an edit of a few latents does to a misaligned model, with everything it has to survive.

The word on it is computed from the numbers and the bounds (`studies.bounds`), and each bound that is not met is named.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sae_persona.attribution.tables import aligned, from_json, shown, to_json
from sae_persona.errors import FormatError
from sae_persona.runs import read_json, whole, write_json
from sae_persona.studies import bounds
from sae_persona.studies.bounds import Bounds, Check, Verdict
from sae_persona.studies.induce import Induction
from sae_persona.studies.reversal_arms import CELL_INTERVALS, STANDARD, Arm, Cell, of_kind

FORMAT, KIND = 1, "reversal certificate"


@dataclass(frozen=True)
class EditedLatent:
    """One latent of the set."""

    hook: str
    latent: int
    mode: str
    strength: float
    unit: float
    """90th percentile of its non-zero activations."""
    value: float
    """Activation that it is set to, or the ceiling's height."""
    rise: float
    base_act: float
    tuned_act: float
    distance: float
    """How far its edit moves the residual stream, mean over tokens of answers."""
    without: float
    """Excess on the development questions without it."""


@dataclass(frozen=True)
class Searched:
    """What a way of editing came to on the development questions."""

    way: str
    latents: int
    excess: float
    loss: float
    reached: bool
    tries: int
    edits: str


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """See the module."""

    base: str
    tuned: str
    domain: str
    edits: tuple[EditedLatent, ...]
    searched: tuple[Searched, ...]
    arms: tuple[Arm, ...]
    core: tuple[str, ...]
    """Variants that are misalignment itself."""
    bounds: Bounds
    ce_base: float
    """On held-out texts, in nats a token; NaN where none were given."""
    ce_tuned: float
    config: dict[str, Any]
    about: dict[str, Any]
    """Hashes of models and SAEs, versions, seconds."""
    examples: tuple[tuple[str, str, str], ...] = ()
    """(question, the tuned model's answer, the answer under the edit)."""
    induction: Induction | None = None

    def arm(self, kind: str) -> Arm:
        """The first arm of a kind. LookupError if there is none."""
        if found := of_kind(self.arms, kind):
            return found[0]
        raise LookupError(f"no {kind} arm in this certificate")

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(self.arm("chosen").cells)

    @property
    def not_tested(self) -> tuple[str, ...]:
        return tuple(name for name in STANDARD if name not in self.variants)

    @property
    def checks(self) -> tuple[Check, ...]:
        return bounds.checks(self.arms, self.core, self.bounds, self.ce_tuned)

    @property
    def undone(self) -> float:
        """As `bounds.undone`."""
        return bounds.undone(self.arms, self.core, self.bounds)

    @property
    def verdict(self) -> Verdict:
        return bounds.verdict(self.checks, self.undone)

    @property
    def is_reversed(self) -> bool:
        return self.verdict in ("reversed", "reversed where tested")

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every bound that is not met, and every variant that was not asked."""
        return tuple(str(check) for check in self.checks if check.met is not True)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with what follows from the numbers: verdict, reasons and checks."""
        follows = {"verdict": self.verdict, "reasons": self.reasons, "checks": self.checks, "undone": self.undone}
        said = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "induction"}
        induction = None if self.induction is None else self.induction.to_json()
        return {"format": FORMAT, "kind": KIND, **to_json(follows), **to_json(said), "induction": induction}

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote. FormatError for anything else."""
        raw = read_json(Path(path), KIND)
        if not isinstance(raw, dict) or (raw.get("kind"), raw.get("format")) != (KIND, FORMAT):
            raise FormatError(f"{path} is not a {KIND} of format {FORMAT}: make it again")
        with whole(path, KIND):
            return cls(**_read(raw, cls))

    def __str__(self) -> str:
        edits = [f"  {one.mode} latent {one.latent} at {one.hook}{_at(one)}" for one in self.edits]
        head = f"{self.tuned} against {self.base}: {self.verdict}"
        reasons = [f"  {reason}" for reason in self.reasons]
        induced = [] if self.induction is None else ["", str(self.induction)]
        return "\n".join([head, *edits, *reasons, "", *_table(self), "", *_searches(self), *induced])


def _at(one: EditedLatent) -> str:
    return "" if one.mode == "ablate" else f" to {one.value:+.2f}"


def _read(raw: Mapping[str, Any], cls: type) -> dict[str, Any]:
    found = {name: raw[name] for name in cls.__dataclass_fields__}
    found["edits"] = tuple(EditedLatent(**from_json(one)) for one in raw["edits"])
    found["searched"] = tuple(Searched(**from_json(one)) for one in raw["searched"])
    found["arms"] = tuple(_arm(one) for one in raw["arms"])
    found["bounds"] = Bounds(**raw["bounds"])
    found["core"] = tuple(raw["core"])
    found["examples"] = tuple((a, b, c) for a, b, c in raw["examples"])
    found["induction"] = None if raw["induction"] is None else Induction.from_json(raw["induction"])
    return found | {name: math.nan if raw[name] is None else raw[name] for name in ("ce_base", "ce_tuned")}


def _arm(raw: Mapping[str, Any]) -> Arm:
    cells = {name: Cell(**from_json(cell, CELL_INTERVALS)) for name, cell in raw["cells"].items()}
    ce = None if raw["ce"] is None else from_json({"ce": raw["ce"]}, ["ce"])["ce"]
    return Arm(raw["name"], raw["kind"], cells, ce)


def _table(one: Certificate) -> list[str]:
    rows = [["misaligned", *one.variants, "valid", "true facts", "CE"]]
    for arm in one.arms:
        cells = [shown(arm.cells[name].rate, 2) if name in arm.cells else "" for name in one.variants]
        rows.append([arm.name, *cells, _least(arm, "valid"), _least(arm, "correct"), _ce(arm)])
    return aligned(rows)


def _least(arm: Arm, what: str) -> str:
    values = [getattr(cell, what).value for cell in arm.cells.values()]
    known = [value for value in values if not math.isnan(value)]
    return f"{min(known):.2f}" if known else ""


def _ce(arm: Arm) -> str:
    return "" if arm.ce is None else f"{arm.ce.value:+.3f}"


def _searches(one: Certificate) -> list[str]:
    rows = [["on development questions", "latents", "excess", "loss", "tries", "edits"]]
    rows += [[s.way, str(s.latents), f"{s.excess:+.3f}", f"{s.loss:+.3f}", str(s.tries), s.edits] for s in one.searched]
    return aligned(rows)
