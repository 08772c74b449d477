"""A reversal certificate as one HTML page that needs no network, no script and no font."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sae_persona.report import numbers, reversal_charts
from sae_persona.report.numbers import percent
from sae_persona.runs import write_text
from sae_persona.studies.bounds import Check
from sae_persona.studies.certificate import Certificate
from sae_persona.studies.reversal_arms import OUT, of_kind

_HERE = Path(__file__).parent
_FILTERS = ("number", "signed", "fixed", "percent", "points", "with_interval")
_SUMS = {
    "reversed": "The misalignment is reversed: every bound is met on every variant.",
    "reversed where tested": "The misalignment is reversed where it was tested; a full reversal was not asked for.",
    "not tested": "Nothing is shown: no core answer could be judged, nothing was misaligned, or there is no control.",
    "cosmetic": "The reversal is cosmetic: the misalignment is gone as it is asked about, and comes back otherwise.",
    "partly": "The misalignment is partly reversed: not every bound is met.",
    "not reversed": "The misalignment is not reversed.",
}


def write_certificate(made: Certificate, out: Path) -> Path:
    """Write the page, whole or not at all."""
    write_text(out, render(made))
    return out


def render(made: Certificate) -> str:
    """The page as a string."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update({name: getattr(numbers, name) for name in _FILTERS})
    environment.filters["check_value"] = check_value
    return environment.get_template("reversal.html").render(
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        made=made,
        sum=_SUMS[made.verdict],
        said=statements(made),
        main=main_variant(made),
        charts=reversal_charts,
        about=json.dumps({"about": made.about, "config": made.config}, indent=1),
    )


def main_variant(made: Certificate) -> str:
    """The core variant that is shown first: out of domain, where it is asked."""
    return OUT if OUT in made.core else made.core[0]


def check_value(check: Check) -> str:
    """The number that is held against the bound, in percentage points."""
    return "not tested" if check.met is None else f"{numbers.signed(100 * check.value, 2)}"


def statements(made: Certificate) -> list[str]:
    """What is to be said of the ways of editing, a sentence each."""
    return [*_change(made), *_milder(made), *_rivals(made), *_induced(made)]


def _change(made: Certificate) -> list[str]:
    name = main_variant(made)
    base, tuned, chosen = (made.arm(kind).cells[name].rate.value for kind in ("base", "tuned", "chosen"))
    n = len(made.edits)
    who = "One latent brings" if n == 1 else f"{n} latents bring"
    return [
        f"{who} misaligned answers {name} from {percent(tuned)} to {percent(chosen)}; the base gives {percent(base)}."
    ]


def _milder(made: Certificate) -> list[str]:
    """Whether the latents carry the misalignment, or only outweigh it."""
    name = main_variant(made)
    limit = made.arm("base").cells[name].rate.value + made.bounds.reach
    said = []
    if {edit.mode for edit in made.edits} == {"clamp"}:
        for arm in of_kind(made.arms, "ablated"):
            rate = arm.cells[name].rate.value
            if rate > limit:
                said.append(
                    f"Ablated, the same leave {percent(rate)}: the fine-tune also changed what is computed elsewhere, "
                    "and the clamp outweighs that rather than undoes it."
                )
            else:
                said.append(f"Ablated, the same leave {percent(rate)}, which is within the bound there.")
    return said


def _rivals(made: Certificate) -> list[str]:
    name, said = main_variant(made), []
    chosen = made.arm("chosen").cells[name].rate.value
    for arm in (*of_kind(made.arms, "difference of means"), *of_kind(made.arms, "prompt")):
        rate = arm.cells[name].rate.value
        word = "leaves less" if rate < chosen else "leaves as much" if rate == chosen else "leaves more"
        said.append(f"{arm.name[:1].upper()}{arm.name[1:]} {word}: {percent(rate)}.")
    return said


def _induced(made: Certificate) -> list[str]:
    if made.induction is None or made.induction.best is None:
        return []
    best = made.induction.best
    rate = best.rates.get(main_variant(made)) or next(iter(best.rates.values()))
    if made.induction.induces:
        to = f"{best.dose:g} of their 90th percentile"
        return [f"Clamped up in the base to {to}, they misalign it: {percent(rate.value)}."]
    return ["Clamped up in the base, they do not misalign it for certain and beyond what random latents do."]
