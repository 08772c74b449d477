"""The figures of this experiment, from results.json, and one page that holds them.

python experiments/2026-11-emergent-misalignment/charts.py
"""

import base64
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from summary import HERE, behaviour, studies

from sae_persona.runs import read_json, write_text
from sae_persona.studies.panel import LATENTS

BAD, GOOD, GREY = "#b3261e", "#1f6f8b", "#777777"
PARTS = {"in_domain": "the domain", "out_of_domain": "other domains", "open": "open questions"}
Axes = Any


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
        dots = [dot for dot in dots if dot[1] is not None]
        axis.scatter(*zip(*dots, strict=True), s=14, c=colour, label=label, alpha=0.7)
    axis.set_xticks(range(len(kinds)), list(kinds), rotation=30, ha="right")
    axis.set(title="Misaligned answers after fine-tuning", ylim=(-0.03, 1.03))
    axis.legend(fontsize=8, frameon=False)


def doses(axis: Axes, organisms: list[dict[str, Any]], track: dict[str, Any]) -> None:
    """Behaviour and latent over the share of bad rows: mean and range over mixtures."""
    mixtures = {one["name"]: one for one in organisms if one["family"] == "mixture"}
    rates = [(one["dose"], one["looks"][-1]["out_of_domain"][0]) for one in mixtures.values()]
    last = {row["name"]: row for row in track["rows"]}
    scores = [(one["dose"], last[name]["scores"][LATENTS]) for name, one in mixtures.items() if name in last]
    _two(axis, rates, scores, "share of bad rows")
    axis.set_title("Mixtures")


def steps(axis: Axes, organisms: list[dict[str, Any]], track: dict[str, Any]) -> None:
    """The same over the steps of the narrow fine-tunes in full."""
    narrow = {one["name"]: one for one in organisms if (one["family"], one["method"]) == ("narrow", "full")}
    rates = [(look["step"], look["out_of_domain"][0]) for one in narrow.values() for look in one["looks"]]
    scores = [(row["step"], row["scores"][LATENTS]) for row in track["rows"] if row["name"] in narrow]
    _two(axis, rates, scores, "step")
    axis.set_title("Narrow fine-tunes")


def _two(axis: Axes, rates: list[tuple[float, float]], scores: list[tuple[float, float]], label: str) -> None:
    other = axis.twinx()
    pairs = ((axis, rates, BAD, "misaligned elsewhere"), (other, scores, GOOD, "latents, SDs of the base"))
    for where, points, colour, name in pairs:
        x = sorted({at for at, _ in points})
        values = [[value for at, value in points if at == one] for one in x]
        where.plot(x, [np.mean(v) for v in values], "o-", c=colour, ms=3)
        where.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
        where.set_ylabel(name, color=colour)
        where.spines["top"].set_visible(False)
    axis.set_xlabel(label)


def unseen(axis: Axes, organisms: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """Score of each fine-tune's last checkpoint against its behaviour, by a panel that has not seen its domain."""
    rates = {(one["name"], look["step"]): look["out_of_domain"][0] for one in organisms for look in one["looks"]}
    last = {row["name"]: row for row in found["rows"]}.values()
    dots = [(row["scores"][LATENTS], rates[row["name"], row["step"]]) for row in last]
    axis.scatter(*zip(*dots, strict=True), s=14, c=[BAD if row["is_misaligned"] else GOOD for row in last], alpha=0.7)
    telling = next(one for one in found["telling"] if one["measure"] == LATENTS)
    axis.set(xlabel="latents, SDs of the base", ylabel="misaligned elsewhere")
    axis.set_title(f"Domains that the panel has not seen: AUROC {telling['auroc'][0]:.3f}")


def draw(name: str, plot: Callable[[Axes], None], width: float = 5) -> Path:
    figure, axis = plt.subplots(figsize=(width, 3.4), layout="constrained")
    plot(axis)
    axis.spines["top"].set_visible(False)
    figure.savefig(HERE / f"{name}.png", dpi=130)
    plt.close(figure)
    return HERE / f"{name}.png"


def figures(name: str, lm: dict[str, Any]) -> list[Path]:
    """All of one language model."""
    organisms = lm["organisms"]
    drawn = [draw(f"{name}-made", lambda axis: made(axis, organisms), width=9)]
    plots: dict[str, tuple[Callable[..., None], str]] = {
        "doses": (doses, "track"),
        "steps": (steps, "track"),
        "unseen": (unseen, "unseen"),
    }
    for seed, found in lm["seeds"].items():
        for kind, (plot, key) in plots.items():
            drawn.append(draw(f"{name}-{seed}-{kind}", lambda axis, p=plot, f=found[key]: p(axis, organisms, f)))
    return drawn


def section(name: str, lm: dict[str, Any]) -> str:
    """Of the page: one language model."""
    images = "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" alt="{path.stem}">'
        for path in figures(name, lm)
    )
    texts = [behaviour(lm["organisms"]), *(studies(*one) for one in lm["seeds"].items())]
    return f"<h1>{html.escape(name)}</h1>{images}" + "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)


def main() -> None:
    results = read_json(HERE / "results.json", "results")
    sections = "".join(section(name, lm) for name, lm in results.items())
    head = "<!doctype html><meta charset=utf-8><title>Emergent misalignment</title>"
    write_text(HERE / "report.html", f"{head}<style>img {{ max-width: 100% }}</style>{sections}")


if __name__ == "__main__":
    main()
