"""A ranking: the table, its text and its file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, overload

from sae_persona.attribution.association import Interval
from sae_persona.attribution.baselines import DenseBaseline, RandomDirections, RandomLatents
from sae_persona.attribution.tables import aligned, shown, to_json
from sae_persona.errors import FormatError
from sae_persona.runs import read_json, write_json

FORMAT = 2
_UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True, kw_only=True)
class RankedLatent:
    """What one latent has to do with the persona. Intervals are 95 %; see Association and Null for each measure."""

    latent: int
    z: float
    """What the ranking is sorted by, by size: the standardised rank sum on train, within blocks; by activations or
    given covariates, the partial correlation times the root of the freedom left."""
    p_max_t: float
    q_bh: float
    auroc: Interval
    r: Interval
    difference: Interval
    d: Interval
    held_out_z: float
    held_out_auroc: Interval
    held_out_p: float
    """Permutation p on the held-out split, one-sided in train's direction, of this latent alone."""
    firing_rate: float
    """Share of the corpus's tokens on which it fires."""
    p999: float
    """99.9th percentile of its non-zero activations over the corpus."""
    unadjusted_z: float = math.nan
    """Given covariates: z by the same formula without them. Else z."""
    partial: Interval = _UNKNOWN
    """Partial correlation on train of midranks (or activations) and label, within blocks and given the covariates."""
    held_out_partial: Interval = _UNKNOWN
    n_templates: int = 0
    """Templates of the train split that have two examples of each class at least."""
    agreement: float = math.nan
    """Share of them in which the latent goes in the direction of z."""
    template_low: float = math.nan
    """Smallest AUROC within a template; template_high is the largest."""
    template_high: float = math.nan

    @property
    def direction(self) -> int:
        """+1 if the latent rises with the persona on train, -1 if it falls."""
        return -1 if self.z < 0 else 1


@dataclass(frozen=True, kw_only=True)
class Ranking(Sequence[RankedLatent]):
    """The latents that go with a persona, strongest first, beside what they have to beat."""

    persona: str
    config: dict[str, Any]
    """The RankConfig it was made with."""
    n_train: tuple[int, int]
    """Examples with the persona and without."""
    n_held_out: tuple[int, int]
    n_blocks: int
    n_tested: int
    """Latents that fired often enough to be tested: what p_max_t and q_bh correct for."""
    rows: tuple[RankedLatent, ...]
    dense: tuple[DenseBaseline, ...]
    random: RandomLatents
    random_directions: RandomDirections = field(default_factory=lambda: RandomDirections(0, math.nan, math.nan))
    hard: dict[int, Interval] = field(default_factory=dict)
    """Latent -> AUROC on held-out positives against the hard negatives alone, where there are any."""
    warnings: tuple[str, ...] = ()
    """What whoever reads the table has to know."""
    controls: tuple[str, ...] = ()
    """Of each covariate given, its name and how it is taken away."""

    @overload
    def __getitem__(self, index: int) -> RankedLatent: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RankedLatent, ...]: ...
    def __getitem__(self, index: int | slice) -> RankedLatent | tuple[RankedLatent, ...]:
        return self.rows[index]

    def __iter__(self) -> Iterator[RankedLatent]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return self.table(10)

    def table(self, n: int) -> str:
        """The first ``n`` latents and the baselines, as plain text."""
        config = self.config
        within = " x ".join(config["within"]) or "one block"
        title = (
            f"{self.persona}: {self.n_tested} latents tested at {config['pool']!r}; examples with + without: "
            f"train {self.n_train[0]} + {self.n_train[1]}, held-out {self.n_held_out[0]} + {self.n_held_out[1]}; "
            f"{config['permutations']} permutations within {self.n_blocks} blocks ({within})"
        )
        given = config.get("given") or ()
        if given:
            title += f"; given {', '.join(self.controls or given)}; z alone and AUROC are without"
        title = "\n".join([title, *(f"warning: {warning}" for warning in self.warnings)])
        heads = ["latent", "z", "p max-T", "q BH", "AUROC train", "AUROC held-out", "p held-out"]
        heads += [*(("z alone", "partial r") if given else ("r",)), "mean diff", "d", "templates", "fires", "p99.9"]
        cells = [[str(row.latent), *_cells(row, bool(given))] for row in self.rows[:n]]
        if self.hard:
            heads.append("AUROC hard negatives")
            cells = [[*row, shown(self.hard[int(row[0])])] for row in cells]
        for base in self.dense:
            auroc, repeated = shown(base.auroc), shown(base.held_out_auroc)
            name = f"{base.name} ({base.note})" if base.note else base.name
            cells.append([name, "", "", "", auroc, repeated, f"{base.held_out_p:.3g}"])
        for what, drawn in (("latents", self.random), ("directions", self.random_directions)):
            if drawn.n:
                found = f"mean {drawn.mean:.3f}, p95 {drawn.p95:.3f}"
                cells.append([f"{drawn.n} random {what}", "", "", "", "", found])
        return "\n".join([title, "", *aligned([heads, *cells])])

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with a format number; null stands for what is not a finite number."""
        return {"format": FORMAT, **to_json({field.name: getattr(self, field.name) for field in fields(self)})}

    @classmethod
    def from_json(cls, value: Any, where: str = "this ranking") -> Self:
        """Read what ``to_json`` gives. FormatError on another format or on missing or unknown parts."""
        found = value.get("format") if isinstance(value, dict) else None
        if found != FORMAT:
            raise FormatError(f"{where} has ranking format {found}, this version reads {FORMAT}: rank again")
        try:
            parts = {name: part for name, part in value.items() if name != "format"}
            parts["rows"] = tuple(RankedLatent(**_numbers(row)) for row in parts["rows"])
            parts["dense"] = tuple(DenseBaseline(**_numbers(base)) for base in parts["dense"])
            parts["random"] = RandomLatents(**_numbers(parts["random"]))
            parts["random_directions"] = RandomDirections(**_numbers(parts["random_directions"]))
            parts["hard"] = {int(latent): Interval(*auroc) for latent, auroc in parts["hard"].items()}
            parts |= {name: tuple(parts.get(name, ())) for name in ("warnings", "controls")}
            parts["n_train"], parts["n_held_out"] = tuple(parts["n_train"]), tuple(parts["n_held_out"])
            return cls(**parts)
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{where} is not a whole ranking ({error}): rank again") from error

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote. FormatError if it is missing, not JSON or of another format."""
        return cls.from_json(read_json(path, "ranking"), str(path))


def _cells(row: RankedLatent, given: bool) -> list[str]:
    return [
        f"{row.z:+.1f}",
        f"{row.p_max_t:.3g}",
        f"{row.q_bh:.2g}",
        shown(row.auroc),
        shown(row.held_out_auroc),
        f"{row.held_out_p:.3g}",
        *((f"{row.unadjusted_z:+.1f}", f"{row.partial.value:+.2f}") if given else (f"{row.r.value:+.2f}",)),
        f"{row.difference.value:+.3g}",
        f"{row.d.value:+.2f}",
        _templates(row),
        f"{row.firing_rate:.2%}",
        f"{row.p999:.3g}",
    ]


def _templates(row: RankedLatent) -> str:
    """In how many templates the latent goes its way, and between which AUROCs."""
    if not row.n_templates:
        return "-"
    agree = round(row.agreement * row.n_templates)
    return f"{agree}/{row.n_templates} {row.template_low:.2f}-{row.template_high:.2f}"


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    def read(value: Any) -> Any:
        return Interval(*map(read, value)) if isinstance(value, list) else math.nan if value is None else value

    return {name: read(value) for name, value in row.items()}
