"""What undoes misalignment, what brings it about, what keeps it off, and what of it stays. A dot is an organism."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from figures_watched import BAD, GOOD, GREY, Axes, Dots, band, scatter
from tables import VARIANTS, certificates

from sae_persona.studies.panel import LATENTS

ELSEWHERE = "misaligned in other domains"


def variants(axis: Axes, seeds: dict[str, Any]) -> None:
    """Misaligned answers of the narrow fine-tunes on each variant: base, tuned, and clamped."""
    found = certificates(seeds).values()
    for arm, shift, colour, label in ((0, -0.2, GREY, "base"), (1, 0.0, BAD, "tuned"), (2, 0.2, GOOD, "clamped")):
        dots = [
            (i + shift, one["arms"][arm]["rates"][variant][0]) for i, variant in enumerate(VARIANTS) for one in found
        ]
        scatter(axis, dots, colour, label)
    axis.set_xticks(range(len(VARIANTS)), list(VARIANTS), rotation=30, ha="right")
    most = max(len(one["edits"]) for one in found)
    axis.set(title=f"{len(found)} narrow fine-tunes, at most {most} latents clamped", ylim=(-0.03, 1.03))
    axis.set_ylabel("misaligned answers")
    axis.legend(fontsize=8, frameon=False)


def arms(axis: Axes, seeds: dict[str, Any]) -> None:
    """Misaligned answers in other domains under what is tried, and under what must fail; a draw each."""
    rates: dict[str, list[float]] = defaultdict(list)
    for one in certificates(seeds).values():
        for arm in one["arms"]:
            rates[arm["name"].rstrip(" 0123456789")].append(arm["rates"]["out of domain"][0])
    names = sorted(rates, key=lambda name: -float(np.mean(rates[name])))
    marked = {"base": GREY, "tuned": BAD, "chosen latents": GOOD}
    for place, name in enumerate(names):
        scatter(axis, [(rate, place) for rate in rates[name]], marked.get(name, "black"))
        axis.plot([np.mean(rates[name])], [place], "|", c="black", ms=14)
    axis.set_yticks(range(len(names)), ["clamped" if name == "chosen latents" else name for name in names])
    axis.set(xlabel=ELSEWHERE, title="What undoes it, and what must not", xlim=(-0.03, 1.03))


def induced(axis: Axes, seeds: dict[str, Any]) -> None:
    """The same latents clamped up in the base."""
    dots: dict[str, Dots] = defaultdict(list)
    for one in certificates(seeds).values():
        for dose in one["induction"]:
            dots["chosen latents"].append((dose["dose"], dose["rates"]["out of domain"][0]))
            dots["valid answers"].append((dose["dose"], dose["valid"][0]))
            dots["random latents"] += [(dose["dose"], rate) for rate in dose["random"].get("out of domain", ())]
    for (name, each), colour in zip(dots.items(), (BAD, GREY, GOOD), strict=True):
        band(axis, each, colour, name)
    axis.set(xlabel="clamp, times q90 of the tuned model", title="The base, clamped up", ylim=(-0.03, 1.03))
    axis.set_ylabel(ELSEWHERE)
    axis.legend(fontsize=8, frameon=False)


def guarded(axis: Axes, seeds: dict[str, Any]) -> None:
    """Fine-tunes on bad rows with guards, examined without them: what they learn, and what it spreads to."""
    dots: dict[str, Dots] = defaultdict(list)
    for one in chain.from_iterable(found["prevent"] for found in seeds.values()):
        name = " ".join((one["method"], one["target"].rstrip(" 0123456789"))).strip()
        rates = [one["test"][part][0] for part in ("in_domain", "out_of_domain")]
        dots[name].append((rates[0], rates[1]))
    marks = {"base": ("o", GREY), "plain": ("o", BAD), "steer": ("^", ""), "penalty": ("s", "")}
    for name, each in dots.items():
        marker, colour = marks[name.split()[0]]
        colour = colour or (GOOD if "latents" in name else "#c98a1b" if "means" in name else "#bbbbbb")
        axis.scatter(*zip(*each, strict=True), s=20, c=colour, marker=marker, label=name, alpha=0.8)
    axis.set(xlabel="misaligned in the domain of the rows", ylabel=ELSEWHERE, title="Guards while it is tuned")
    axis.legend(fontsize=7, frameon=False)


def healing(axis: Axes, seeds: dict[str, Any]) -> None:
    """Misaligned answers and latents over the steps of a fine-tune on good rows."""
    curves: dict[str, Dots] = defaultdict(list)
    for one in chain.from_iterable(found["realign"]["healings"] for found in seeds.values()):
        for point in one["points"]:
            curves[f"rate, {one['source']}"].append((point["step"], point["rates"]["out_of_domain"][0]))
            share = point["scores"][LATENTS][0] / one["points"][0]["scores"][LATENTS][0]
            curves[f"latents, {one['source']}"].append((point["step"], share))
    colours = {"rate, the same domain": BAD, "rate, another": "#e08b86"}
    colours |= {"latents, the same domain": GOOD, "latents, another": "#86b5c4"}
    for name, dots in sorted(curves.items(), reverse=True):
        band(axis, dots, colours[name], name)
    axis.set(xlabel="step on good rows", title="Healed: rates, and latents as a share of their rise")
    axis.legend(fontsize=8, frameon=False)


def relearning(axis: Axes, seeds: dict[str, Any]) -> None:
    """Misaligned answers over the steps of a second fine-tune on bad rows."""
    curves: dict[str, Dots] = defaultdict(list)
    for one in chain.from_iterable(found["realign"]["relearnings"] for found in seeds.values()):
        name = " on ".join(part for part in (one["start"].split(" on ")[0], one["source"]) if part)
        curves[name] += [(point["step"], point["rates"]["out_of_domain"][0]) for point in one["points"]]
    colours = (GREY, "#86b5c4", GOOD, "#e08b86", BAD)
    for (name, dots), colour in zip(curves.items(), colours, strict=True):
        band(axis, dots, colour, name)
    axis.set(xlabel="step on bad rows", ylabel=ELSEWHERE, title="Made bad again")
    axis.legend(fontsize=8, frameon=False)


def coupled(axis: Axes, seeds: dict[str, Any]) -> None:
    """Rank correlation of what foretells a coupling with the coupling, out of sample; a dot a seed."""
    found = [one["coupling"] for one in seeds.values() if "coupling" in one]
    measures = [one["by"] for one in found[0]["foretold"][0]]
    for shift, (i, how), colour in zip((-0.2, 0.0, 0.2), enumerate(found[0]["how"]), (BAD, GOOD, GREY), strict=True):
        scatter(axis, _places(found, measures, i, shift), colour, how)
    axis.axvline(0, color="black", lw=0.5)
    axis.set_yticks(range(len(measures)), measures)
    axis.invert_yaxis()
    axis.set(xlabel="Spearman", title="What foretells the effect of one trait on another")
    axis.legend(fontsize=8, frameon=False)


def _places(found: Sequence[dict[str, Any]], measures: Sequence[str], i: int, shift: float) -> Dots:
    return [
        (said["spearman"][0], measures.index(said["by"]) + shift)
        for one in found
        for said in one["foretold"][i]
        if said["spearman"][0] is not None
    ]
