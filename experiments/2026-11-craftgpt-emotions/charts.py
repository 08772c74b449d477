"""The one figure of this experiment."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"difference of means, pre": "C0", "difference of means, mean": "C2", "told in the question": "C4"}


def draw(results: dict[str, Any], randoms: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Judged rates on the test questions: the chosen latent, random latents at its cost, and the other controls."""
    figure, axes = plt.subplots(1, len(randoms), figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, (persona, arms) in zip(axes, randoms.items(), strict=True):
        found = results["personas"][persona]
        axis.scatter([arm["cost"] for arm in arms], [arm["rate"] for arm in arms], s=9, c="0.6", label="random latents")
        for name, arm in found["arms"].items():
            rate, low, high = arm["rate"]
            colour = COLOURS.get(name, "C3")
            bars = [[rate - low], [high - rate]]
            axis.errorbar(arm["cost"][0], rate, bars, fmt="o", ms=5, capsize=3, c=colour, label=name)
        axis.axhline(found["baseline"][persona][0], c="0.4", lw=0.8, ls="--", label="not steered")
        axis.set(title=persona, xlabel="perplexity under the unsteered model, as a multiple")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of answers with a judge word")
    axes[-1].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
