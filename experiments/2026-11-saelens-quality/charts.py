"""The one figure of this experiment, from its result files.

python experiments/2026-11-saelens-quality/charts.py
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from summary import HERE, RULE_NAMES

from sae_persona.runs import read_json

PANELS = (("lab", "fvu", "lab: FVU"), ("craftgpt", "fvu", "CraftGPT: FVU"), ("dictionary", "recovered", "atoms found"))
SIDES = (("ours", "C0", "ours"), ("sae_lens", "C1", "SAELens"))


def draw() -> None:
    """A dot a seed: FVU on both models, and the share of the known atoms that was found."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3), layout="constrained")
    for axis, (name, measure, title) in zip(axes, PANELS, strict=True):
        rules = read_json(HERE / f"{name}.json", "results")["rules"]
        for shift, (side, colour, label) in zip((-0.1, 0.1), SIDES, strict=True):
            dots = [
                (at + shift, row[measure])
                for at, found in enumerate(rules.values())
                for row in found["rows"]
                if row["side"] == side
            ]
            axis.scatter(*zip(*dots, strict=True), s=16, c=colour, label=label)
        axis.set_xticks(range(len(rules)), [RULE_NAMES[rule] for rule in rules])
        axis.set(title=title, xlim=(-0.5, len(rules) - 0.5))
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(fontsize=8, frameon=False)
    figure.savefig(HERE / "quality.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw()
