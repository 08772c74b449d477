"""Gather what run.py has left in OUT into results.json, and print the tables that the README quotes.

python experiments/2026-11-emergent-misalignment/summary.py OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

from gather import HERE, gather
from tables import bounds, foretold, guarded, healed, made, other_kinds, reversals, undone, watched

from sae_persona.runs import write_text


def summary(lm: dict[str, Any]) -> str:
    """Every table of one language model; of the parts that have been run."""
    seeds = lm["seeds"]
    parts = [made(lm["organisms"]), *(watched(*one) for one in seeds.items()), other_kinds(lm["organisms"], seeds)]
    if any(found["reversals"] for found in seeds.values()):
        parts += [reversals(seeds), undone(seeds)]
    for name, table in (("prevent", guarded), ("realign", healed), ("coupling", foretold)):
        if any(name in found for found in seeds.values()):
            parts.append(table({seed: found[name] for seed, found in seeds.items() if name in found}))
    return "\n\n".join([*parts, bounds(lm)])


def main(out: Path) -> None:
    results = gather(out)
    write_text(HERE / "results.json", json.dumps(results, allow_nan=False, separators=(",", ":")) + "\n")
    for name, lm in results.items():
        print(name, summary(lm), sep="\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
