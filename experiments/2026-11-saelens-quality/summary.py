"""Intervals over a few seeds, and the tables of the README from the result files.

python experiments/2026-11-saelens-quality/summary.py
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

from sae_persona.runs import read_json

HERE = Path(__file__).parent
RULE_NAMES = {"topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU"}


def interval(values: Sequence[float]) -> list[float]:
    """Mean, and the ends of its 95 % interval by Student's t."""
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return [mean(values), mean(values) - half, mean(values) + half]


def side_mean(found: dict[str, Any], side: str, measure: str) -> float:
    """Mean over the seeds of one side."""
    return mean(row[measure] for row in found["rows"] if row["side"] == side)


def _shown(values: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{x:+.{digits}f}" for x in values)
    return f"{middle} [{low}, {high}]"


def _pair(found: dict[str, Any], measure: str, digits: int) -> str:
    return " / ".join(f"{side_mean(found, side, measure):.{digits}f}" for side in ("ours", "sae_lens"))


def quality_tables(name: str) -> list[str]:
    """One row a rule: what is compared with its difference; then how each side came to it."""
    rules = read_json(HERE / f"{name}.json", "results")["rules"].items()
    lines = [f"| {name}: ours / SAELens | FVU | difference | CE recovered | difference |", "|" + "---|" * 5]
    for rule, found in rules:
        off = found["ours - sae_lens"]
        lines.append(
            f"| {RULE_NAMES[rule]} | {_pair(found, 'fvu', 4)} | {_shown(off['fvu'], 4)} |"
            f" {_pair(found, 'ce_recovered', 4)} | {_shown(off['ce_recovered'], 4)} |"
        )
    lines += ["", f"| {name}: ours / SAELens | learning rate | L0 as exported | L0 on test texts | dead | seconds |"]
    lines.append("|" + "---|" * 6)
    for rule, found in rules:
        lines.append(
            f"| {RULE_NAMES[rule]} | {_rates(found)} | {_pair(found, 'l0_exported', 1)} | {_pair(found, 'l0', 2)} |"
            f" {_pair(found, 'dead', 3)} | {_pair(found, 'seconds', 0)} |"
        )
    return lines


def _rates(found: dict[str, Any]) -> str:
    return " / ".join(f"{found['chosen'][side]['lr']:g}" for side in ("ours", "sae_lens"))


def dictionary_table() -> list[str]:
    """One row a rule: recovered shares of both sides, by quarter of frequency, and the difference with its interval."""
    lines = [
        "| ours / SAELens | recovered | difference | weighted by frequency | quarters, most frequent first | FVU |",
        "|" + "---|" * 6,
    ]
    for rule, found in read_json(HERE / "dictionary.json", "results")["rules"].items():
        quarters = "; ".join(_pair(found, f"quarter_{i}", 2) for i in range(1, 5))
        lines.append(
            f"| {RULE_NAMES[rule]} | {_pair(found, 'recovered', 3)} |"
            f" {_shown(found['ours - sae_lens']['recovered'], 3)} | {_pair(found, 'weighted', 3)} | {quarters} |"
            f" {_pair(found, 'fvu', 3)} |"
        )
    return lines


def main() -> None:
    """Print the tables."""
    for name in ("lab", "craftgpt"):
        print("\n".join(quality_tables(name)), end="\n\n")
    print("\n".join(dictionary_table()))


if __name__ == "__main__":
    main()
