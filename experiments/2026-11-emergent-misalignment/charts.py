"""The figures of this experiment, from results.json, and one page that holds them.

python experiments/2026-11-emergent-misalignment/charts.py
"""

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import figures_undone as undone
import figures_watched as watched
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from gather import HERE
from summary import summary

from sae_persona.runs import read_json, write_text

PARTS = {
    "reversals": {"variants": undone.variants, "arms": undone.arms, "induced": undone.induced},
    "prevent": {"guarded": undone.guarded},
    "realign": {"healing": undone.healing, "relearning": undone.relearning},
    "coupling": {"coupled": undone.coupled},
}
"""Figures of all seeds together, by what must have been run."""
WIDE = {"made": 9, "variants": 7, "arms": 7, "coupled": 7}
"""Inches; others are 5 wide."""
Plot = Callable[[Any], None]


def figures(name: str, lm: dict[str, Any]) -> list[Path]:
    """All of one language model."""
    organisms, seeds = lm["organisms"], lm["seeds"]
    drawn = [draw(f"{name}-made", [lambda axis: watched.made(axis, organisms)], WIDE["made"])]
    for seed, found in seeds.items():
        seen = (watched.doses, watched.steps, watched.unseen)
        drawn.append(draw(f"{name}-{seed}", [lambda axis, p=plot, f=found: p(axis, organisms, f) for plot in seen], 15))
    for part, plots in PARTS.items():
        if any(found.get(part) for found in seeds.values()):
            for kind, plot in plots.items():
                drawn.append(draw(f"{name}-{kind}", [lambda axis, p=plot: p(axis, seeds)], WIDE.get(kind, 5)))
    return drawn


def draw(name: str, plots: Sequence[Plot], width: float) -> Path:
    """One file of plots side by side."""
    figure, axes = plt.subplots(1, len(plots), figsize=(width, 3.4), layout="constrained", squeeze=False)
    for axis, plot in zip(axes[0], plots, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        plot(axis)
    figure.savefig(HERE / f"{name}.png", dpi=110)
    plt.close(figure)
    return HERE / f"{name}.png"


def section(name: str, lm: dict[str, Any]) -> str:
    """Of the page: one language model."""
    images = "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" alt="{path.stem}">'
        for path in figures(name, lm)
    )
    return f"<h1>{html.escape(name)}</h1>{images}<pre>{html.escape(summary(lm))}</pre>"


def main() -> None:
    results = read_json(HERE / "results.json", "results")
    sections = "".join(section(name, lm) for name, lm in results.items())
    head = "<!doctype html><meta charset=utf-8><title>Emergent misalignment</title>"
    style = "body { font: 15px system-ui; margin: 2em } img { max-width: 100% } pre { overflow-x: auto }"
    write_text(HERE / "report.html", f"{head}<style>{style}</style>{sections}")


if __name__ == "__main__":
    main()
