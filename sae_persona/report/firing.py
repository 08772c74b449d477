"""Which latents fire, and how often: those that are dead, those that never fired, and the others by decade."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from markupsafe import Markup
from torch import Tensor

from sae_persona.features.stats import LatentStats
from sae_persona.report.numbers import number, percent
from sae_persona.report.svg import Axis, Drawing


@dataclass(frozen=True)
class Decade:
    """``n`` latents from ``low`` to below ``high``. Nothing lies above a rate of 1, so its decade has it, too."""

    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class FiringReport:
    """What is known of n_latents latents after n_tokens tokens.

    never_fired   on none of the tokens
    dead          silent for ``dead_after`` tokens or more; None where that is not known
    decades       of the firing rate, of those that fired
    """

    n_latents: int
    n_tokens: int
    never_fired: int
    dead_after: int | None
    dead: int | None
    decades: tuple[Decade, ...]

    @classmethod
    def of_stats(cls, stats: LatentStats, *, dead_after: int | None = None) -> Self:
        """From the measured tokens. Dead are those that never fired, if the tokens are ``dead_after`` or more."""
        never = int((stats.fired == 0).sum())
        known = dead_after is not None and stats.n_tokens >= dead_after
        return cls(
            n_latents=stats.n_latents,
            n_tokens=stats.n_tokens,
            never_fired=never,
            dead_after=dead_after,
            dead=never if known else None,
            decades=_decades(stats.firing_rate[stats.fired > 0]),
        )

    @property
    def dead_share(self) -> float | None:
        """Share of the latents that are dead."""
        return None if self.dead is None else self.dead / self.n_latents

    @property
    def rows(self) -> list[tuple[str, int]]:
        """Every latent once: a name and a number of latents, from the least alive."""
        decades = [(f"{_power(d.low)} to {_power(d.high)}", d.n) for d in self.decades]
        return [("never fired", self.never_fired), *decades]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "decades": [asdict(decade) for decade in self.decades], "dead_share": self.dead_share}

    def __str__(self) -> str:
        said = f"{self.n_latents} latents, {self.n_tokens} tokens: {self.never_fired} never fired"
        if self.dead is not None:
            said += f", {self.dead} dead ({self.dead_share:.1%}: silent for {self.dead_after} tokens or more)"
        lines = [f"  {name:<18}{n:>9}{n / self.n_latents:>9.1%}" for name, n in self.rows]
        return "\n".join([said, f"  {'firing rate':<23}{'latents':>4}{'share':>9}", *lines])


def _decades(rates: Tensor) -> tuple[Decade, ...]:
    """The decades from the least to the greatest of the rates, all above 0; a rate of 1 counts to the one below it."""
    if not len(rates):
        return ()
    ends = torch.tensor([10.0**e for e in range(-18, 1)], dtype=torch.float64)
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    found = torch.bucketize(rates.clamp(max=below_one).cpu(), ends, right=True)
    counts = torch.bincount(found, minlength=len(ends) + 1)
    first, final = int(found.min()), int(found.max())
    return tuple(Decade(ends[i - 1].item(), ends[i].item(), int(counts[i])) for i in range(first, final + 1))


def _power(value: float) -> str:
    """A power of ten; 1 as it is."""
    exponent = round(math.log10(value))
    return f"10{str(exponent).translate(_RAISED)}" if exponent else "1"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def firing_chart(report: FiringReport) -> Markup:
    """A bar for each row of the report, from those that never fired to the liveliest."""
    rows = report.rows
    draw = Drawing(390, 250, "Latents by firing rate")
    y = Axis(0, max(n for _, n in rows) * 1.15 or 1, 190, 28)
    draw.y_axis(y, (46, 382), "latents", [(v, number(v)) for v in y.ticks(4) if v == int(v)])
    wide = (382 - 46) / len(rows)
    for i, (name, n) in enumerate(rows):
        left, top, kind = 46 + i * wide + 2, y.at(n), "dense" if name == "never fired" else "latent"
        title = f"{name}: {number(n, 9)} latents, {percent(n / report.n_latents)}"
        form = '<rect class="mark {}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>'
        draw.add(form, kind, left, top, wide - 4, 190 - top, title)
        draw.text(left + wide / 2 - 2, top - 5, number(n, 9), f"label {kind}")
        for line, words in enumerate(_halves(name)):
            draw.text(left + wide / 2 - 2, 206 + 14 * line, words)
    draw.text((46 + 382) / 2, 244, "firing rate", "name")
    return draw.svg()


def _halves(name: str) -> list[str]:
    """A bar's name in two lines, short enough for a narrow bar."""
    return ["never", "fired"] if name == "never fired" else [f"{name.split()[0]} –", name.split()[-1]]
