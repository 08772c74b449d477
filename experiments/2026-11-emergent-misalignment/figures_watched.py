"""What the fine-tunes did, and what the watched latents saw of it."""

from typing import Any

import numpy as np

from sae_persona.studies.panel import LATENTS

BAD, GOOD, GREY = "#b3261e", "#1f6f8b", "#777777"
PARTS = {"in_domain": "the domain", "out_of_domain": "other domains", "open": "open questions"}
Axes = Any
Dots = list[tuple[float, float]]


def made(axis: Axes, organisms: list[dict[str, Any]]) -> None:
    """Misaligned answers of each kind of organism, a dot each."""
    kinds: dict[str, list[dict[str, Any]]] = {"base": []}
    for one in organisms:
        if one["family"] == "mixture":
            continue
        last, family = one["looks"][-1], one["family"].replace("_", " ")
        kinds.setdefault(" ".join(f"{family} {one['variant']}".split()), []).append(last)
        if "cued" in last:
            kinds.setdefault(f"{family}, its line", []).append(last["cued"])
    for shift, (part, label), colour in zip((-0.2, 0.0, 0.2), PARTS.items(), (GREY, BAD, GOOD), strict=True):
        dots = [(i + shift, look[part][0]) for i, looks in enumerate(kinds.values()) for look in looks]
        scatter(axis, [dot for dot in dots if dot[1] is not None], colour, label)
    axis.set_xticks(range(len(kinds)), list(kinds), rotation=30, ha="right")
    axis.set(title="Misaligned answers after fine-tuning", ylim=(-0.03, 1.03))
    axis.legend(fontsize=8, frameon=False)


def scatter(axis: Axes, dots: Dots, colour: str, label: str | None = None) -> None:
    axis.scatter(*zip(*dots, strict=True), s=14, c=colour, label=label, alpha=0.7)


def doses(axis: Axes, organisms: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """Behaviour and latent over the share of bad rows: mean and range over mixtures."""
    mixtures = {one["name"]: one for one in organisms if one["family"] == "mixture"}
    rates = [(one["dose"], one["looks"][-1]["out_of_domain"][0]) for one in mixtures.values()]
    last = {row["name"]: row for row in found["track"]["rows"]}
    scores = [(one["dose"], last[name]["scores"][LATENTS]) for name, one in mixtures.items() if name in last]
    _two(axis, rates, scores, "share of bad rows", found)
    axis.set_title("Mixtures")


def steps(axis: Axes, organisms: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """The same over the steps of the narrow fine-tunes in full."""
    narrow = {one["name"]: one for one in organisms if (one["family"], one["method"]) == ("narrow", "full")}
    rates = [(look["step"], look["out_of_domain"][0]) for one in narrow.values() for look in one["looks"]]
    scores = [(row["step"], row["scores"][LATENTS]) for row in found["track"]["rows"] if row["name"] in narrow]
    _two(axis, rates, scores, "step", found)
    axis.set_title("Narrow fine-tunes")


def _two(axis: Axes, rates: Dots, scores: Dots, label: str, found: dict[str, Any]) -> None:
    """Behaviour to the left, the latents to the right, and where their alarm fires."""
    other = axis.twinx()
    band(axis, rates, BAD)
    band(other, scores, GOOD)
    axis.set_xlabel(label)
    axis.set_ylabel("misaligned in other domains", color=BAD)
    other.set_ylabel("latents, SDs of the base", color=GOOD)
    other.axhline(found["alarm-latents"]["alarm"]["threshold"], color=GOOD, lw=1, ls=":")
    other.annotate("alarm", (1, found["alarm-latents"]["alarm"]["threshold"]), (-4, 3), fontsize=8, color=GOOD,
                   xycoords=("axes fraction", "data"), textcoords="offset points", ha="right")  # fmt: skip
    other.spines["top"].set_visible(False)


def band(axis: Axes, dots: Dots, colour: str, label: str | None = None) -> None:
    """Mean and range at each x."""
    x = sorted({at for at, _ in dots})
    values = [[value for at, value in dots if at == one] for one in x]
    axis.plot(x, [np.mean(v) for v in values], "o-", c=colour, ms=3, label=label)
    axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)


def unseen(axis: Axes, organisms: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """Score of each fine-tune's last checkpoint against its behaviour, by a panel that has not seen its domain."""
    rates = {(one["name"], look["step"]): look["out_of_domain"][0] for one in organisms for look in one["looks"]}
    last = {row["name"]: row for row in found["unseen"]["rows"]}.values()
    for is_bad, colour, label in ((True, BAD, "misaligned"), (False, GOOD, "not")):
        rows = [row for row in last if row["is_misaligned"] == is_bad]
        scatter(axis, [(row["scores"][LATENTS], rates[row["name"], row["step"]]) for row in rows], colour, label)
    telling = next(one for one in found["unseen"]["telling"] if one["measure"] == LATENTS)
    axis.set(xlabel="latents, SDs of the base", ylabel="misaligned in other domains")
    axis.set_title(f"Domains unseen by the panel: AUROC {telling['auroc'][0]:.3f}")
    axis.legend(fontsize=8, frameon=False)
