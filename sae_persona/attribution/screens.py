"""A causal screen: the table, its text and its file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, overload

from sae_persona.attribution.association import Interval
from sae_persona.attribution.tables import aligned, from_json, shown, to_json
from sae_persona.errors import FormatError
from sae_persona.runs import read_json, write_json

FORMAT = 2
LEVEL = 0.05

Verdict = Literal[
    "causal", "opposite", "associated only", "effect only", "no", "silent", "underpowered", "few questions"
]
"""causal: told by the ranking, again on held-out examples, and its effect has the sign that the ranking says, a p over
questions up to 5 % after Holm's correction for the latents tested, and is beyond the random latents'. opposite: such an
effect of the other sign. associated only: the ranking holds, the effect does not. effect only: the effect holds, the
ranking does not. no: neither. silent: setting it changes nothing in any held-out pair, so nothing was tested.
underpowered: too few random latents for a p of 5 %. few questions: too few for a verdict, p and interval are over
pairs."""


@dataclass(frozen=True, kw_only=True)
class ScreenedLatent:
    """What one latent does to the metric, beside what the ranking says of it. Effects are in nats."""

    latent: int
    rank: int | None
    """Place in the ranking by association, from 1; None for one that only its estimate brought in."""
    direction: int
    """+1 if the ranking says that it rises with the persona, -1 if it falls, 0 without a rank."""
    p_max_t: float
    held_out_auroc: Interval
    held_out_p: float
    estimate: float
    """Of the effect, by attribution patching on the train pairs."""
    estimate_rank: int
    """Place by the size of the estimate among all latents, from 1."""
    integrated: float
    """The same by integrated gradients; NaN where they were not asked for."""
    delta: float
    """Attribution of the persona's answer minus that of the other one; positive speaks for the persona."""
    fires: float
    """Share of the held-out pairs in which setting the latent changes anything."""
    effect: Interval
    """Exact, on the held-out pairs: metric with the latent set minus without, a mean over questions."""
    p_effect: float
    """Of no effect, by t over questions, adjusted for the latents tested (Holm); 1 for one that is silent."""
    rate: float
    """Share of the train pairs' edited tokens on which it fires."""
    random_rate: float
    """Median of the same over the random latents that it is compared with."""
    n_random: int
    """How many those are."""
    like: bool
    """Whether each of those fires at least half and at most twice as often."""
    p_random: float
    """Share of those whose effect is at least as large in size, (1 + #) / (1 + n)."""
    output_score: float | None = None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well estimates from one split's pairs agree with exact effects on the held-out pairs, over latents."""

    estimate: Literal["gradient", "integrated", "delta"]
    split: Literal["train", "held_out"]
    n: int
    """Latents whose exact effect was measured: those in the table and the random ones."""
    spearman: Interval
    """By the bootstrap over latents. Of delta: with the effect's sign turned where latents are ablated."""
    same_sign: float
    """Share of the latents with an effect whose estimate has its sign."""


@dataclass(frozen=True, kw_only=True)
class RandomEffects:
    """Sizes of the effects of latents that fire as often and as strongly as those in the table, at the same tokens."""

    latents: tuple[int, ...]
    effects: tuple[float, ...]
    """Mean over the questions of the held-out pairs, with its sign."""
    rates: tuple[float, ...]
    """Share of the train pairs' edited tokens on which each fires."""
    mean: float
    """Of the sizes."""
    p95: float


@dataclass(frozen=True, kw_only=True)
class Screen(Sequence[ScreenedLatent]):
    """The latents of a ranking, by association and then by what they cause."""

    persona: str
    config: dict[str, Any]
    """The ScreenConfig it was made with, ``positions`` resolved."""
    n_train: int
    """Contrast pairs that estimates are from."""
    n_held_out: int
    """Contrast pairs that exact effects are from."""
    n_questions: int
    """Different questions among those."""
    over: Literal["questions", "pairs"]
    """What intervals are over: pairs where there are too few questions, and then nothing is said about others."""
    base: Interval
    """Metric of the held-out pairs without an edit: above 0 the model prefers the persona's answers."""
    rows: tuple[ScreenedLatent, ...]
    random: RandomEffects
    agreement: tuple[Agreement, ...]

    @overload
    def __getitem__(self, index: int) -> ScreenedLatent: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ScreenedLatent, ...]: ...
    def __getitem__(self, index: int | slice) -> ScreenedLatent | tuple[ScreenedLatent, ...]:
        return self.rows[index]

    def __iter__(self) -> Iterator[ScreenedLatent]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def causal(self) -> tuple[ScreenedLatent, ...]:
        """The latents that pass: associated, repeated, and with an effect."""
        return tuple(row for row in self.rows if row.verdict == "causal")

    def __str__(self) -> str:
        return "\n".join([self._title(), *self._warnings(), "", *aligned(self._cells()), "", *self._agreements()])

    def _warnings(self) -> list[str]:
        few = [f"warning: {self.n_questions} questions are too few for a verdict"] if self.over == "pairs" else []
        unlike = [row for row in self.rows if not row.like and row.fires and row.n_random]
        if not unlike:
            return few
        named = ", ".join(f"{row.latent} ({row.rate:.2%} of the tokens, they {row.random_rate:.2%})" for row in unlike)
        return [*few, f"warning: too few random latents fire within half and twice as often as {named}"]

    def _title(self) -> str:
        strength = self.config["strength"]
        done = f"set to {strength:g} x p99.9" if strength else "ablated"
        unit = "nats a token" if self.config["metric"] == "mean" else "nats"
        return (
            f"{self.persona}: latents {done} at {self.config['positions']!r}; estimates from {self.n_train} contrast "
            f"pairs, exact effects from {self.n_held_out} held-out pairs on {self.n_questions} questions, intervals "
            f"over {self.over}; the persona's answer leads by {shown(self.base, 2, '+')} {unit}"
        )

    def _cells(self) -> list[list[str]]:
        heads = ["latent", "rank", "p max-T", "AUROC held-out", "p held-out", "estimate", "est. rank", "integrated"]
        heads += ["delta", "fires", "exact effect", "p Holm", "rate", "random rate", "p random"]
        scored = any(row.output_score is not None for row in self.rows)
        cells = [[*heads, *(["output"] if scored else []), "verdict"]]
        for row in self.rows:
            told = [f"{row.rank}", f"{row.p_max_t:.3g}", shown(row.held_out_auroc), f"{row.held_out_p:.3g}"]
            line = [str(row.latent), *(told if row.rank is not None else ["-"] * 4)]
            line += [f"{row.estimate:+.3f}", str(row.estimate_rank), _number(row.integrated), f"{row.delta:+.3f}"]
            line += [f"{row.fires:.0%}", shown(row.effect, 3, "+"), f"{row.p_effect:.2g}"]
            line += [f"{row.rate:.2%}", f"{row.random_rate:.2%}", f"{row.p_random:.3g}"]
            score = [] if not scored else ["" if row.output_score is None else f"{row.output_score:.3f}"]
            cells.append([*line, *score, row.verdict])
        n = len(self.random.latents)
        found = f"size: mean {self.random.mean:.3f}, p95 {self.random.p95:.3f}"
        return [*cells, [f"{n} random latents", *[""] * 9, found]]

    def _agreements(self) -> list[str]:
        return [
            f"{a.estimate} on {a.split} pairs against exact: Spearman {shown(a.spearman, 2, '+')}, same sign "
            f"{_share(a.same_sign)}, over {a.n} latents"
            for a in self.agreement
        ]

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with a format number; null stands for what is not a finite number."""
        return {"format": FORMAT, **to_json({field.name: getattr(self, field.name) for field in fields(self)})}

    @classmethod
    def from_json(cls, value: Any, where: str = "this screen") -> Self:
        """Read what ``to_json`` gives. FormatError on another format or on missing or unknown parts."""
        found = value.get("format") if isinstance(value, dict) else None
        if found != FORMAT:
            raise FormatError(f"{where} has screen format {found}, this version reads {FORMAT}: screen again")
        try:
            parts = {name: part for name, part in value.items() if name != "format"}
            parts["rows"] = tuple(_row(row) for row in parts["rows"])
            parts["random"] = RandomEffects(
                **from_json({name: tuple(x) if isinstance(x, list) else x for name, x in parts["random"].items()})
            )
            parts["agreement"] = tuple(Agreement(**from_json(row, ("spearman",))) for row in parts["agreement"])
            return cls(**from_json(parts, ("base",)))
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{where} is not a whole screen ({error}): screen again") from error

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote. FormatError if it is missing, not JSON or of another format."""
        return cls.from_json(read_json(path, "screen"), str(path))


def _row(row: dict[str, Any]) -> ScreenedLatent:
    """``rank`` and ``output_score`` may be missing; every other null is NaN."""
    absent = {name: row[name] for name in ("rank", "output_score")}
    return ScreenedLatent(**{**from_json(row, ("held_out_auroc", "effect")), **absent})


def _number(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "-"


def _share(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "-"
