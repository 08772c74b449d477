"""Gather what run.py has left in OUT into results.json, and print the tables that the README quotes.

python experiments/2026-11-emergent-misalignment/summary.py OUT
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from sae_persona.attribution.tables import aligned
from sae_persona.runs import read_json, write_json
from sae_persona.studies.organisms import Organism, organisms_in
from sae_persona.studies.panel import LATENTS, MEANS

HERE = Path(__file__).parent
PARTS = ("in_domain", "out_of_domain", "open", "valid")
TRACKED = ("name", "step", "is_misaligned", "seen")
FACTS = ("name", "family", "method", "domain", "dose", "seed")


def gather(out: Path) -> dict[str, Any]:
    """Of every language model that is in OUT: its organisms' rates, and what the studies found."""
    return {
        folder.name: {
            "organisms": [_organism(one) for one in organisms_in(folder / "organisms")],
            "seeds": {seed.name: _studies(seed) for seed in sorted(folder.glob("seed-*"))},
        }
        for folder in sorted(out.glob("lm-*"))
    }


def _organism(one: Organism) -> dict[str, Any]:
    def rates(scores: dict[str, Any]) -> dict[str, list[float | None]]:
        return {part: [scores[part][key] for key in ("rate", "low", "high")] for part in PARTS}

    looks = []
    for point in one.checkpoints:
        cued = {"cued": rates(point.scores["cued"])} if "cued" in point.scores else {}
        looks.append({"step": point.step, "loss": point.loss, **rates(point.scores), **cued})
    return {key: getattr(one, key) for key in FACTS} | {"variant": one.config["variant"], "looks": looks}


def _studies(folder: Path) -> dict[str, Any]:
    """Without the parts that are as long as the prompts or the rows."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        raw = read_json(path, "study")
        if path.stem in ("track", "unseen"):
            rows = [
                {key: row[key] for key in TRACKED}
                | {"scores": {name: round(row["scores"][name][0], 4) for name in (LATENTS, MEANS)}}
                for row in raw["rows"]
            ]
            found[path.stem] = {"panel": raw["panel"], "telling": raw["telling"], "rows": rows}
        elif path.stem.startswith("rows-"):
            found[path.stem] = raw["auroc"]
        elif path.stem == "diff":
            found["diff"] = [
                {"name": one["name"], "fvu": one["fvu"], "up": one["up"][:3], "down": one["down"][:3]}
                for one in raw["tuned"]
            ]
        elif path.stem == "panel":
            found["panel"] = raw["names"]
        else:
            found[path.stem] = raw
    return found


def behaviour(organisms: list[dict[str, Any]]) -> str:
    """Rates of the last checkpoints: mean over organisms of a kind, least and most."""
    kinds = defaultdict(list)
    for one in organisms:
        dose = f" {100 * one['dose']:g} %" if one["family"] == "mixture" else ""
        name = f"{one['family']}{dose} {one['variant']} {one['method'] if one['family'] != 'base' else ''}"
        kinds[" ".join(name.split())].append(one["looks"][-1])
        if "cued" in one["looks"][-1]:
            kinds[f"{one['family']} after its line"].append(one["looks"][-1]["cued"])
    table = [["organisms", "n", "in domain", "out of domain", "open", "valid"]]
    for kind, looks in kinds.items():
        cells = [[look[part][0] for look in looks if look[part][0] is not None] for part in PARTS]
        shown = [f"{np.mean(c):.2f} ({min(c):.2f} to {max(c):.2f})" if c else "-" for c in cells]
        table.append([kind, str(len(looks)), *shown])
    return "\n".join(aligned(table))


def studies(seed: str, found: dict[str, Any]) -> str:
    """One seed's verdicts."""
    lines = [seed, f"panel: {', '.join(found['panel'])}"]
    for name in ("track", "unseen"):
        for one in found[name]["telling"]:
            area = [float("nan") if part is None else part for part in one["auroc"]]
            lines.append(f"{name}: {one['measure']:26} AUROC {area[0]:.3f} [{area[1]:.3f}, {area[2]:.3f}]")
    for name in (key for key in found if key.startswith("alarm-")):
        leads = [lead for lead in found[name]["leads"] if lead["behaviour"] is not None]
        by = {by: [lead["leads"] for lead in leads if lead["by"] == by] for by in ("step", "dose")}
        counts = ", ".join(f"{sum(won)} of {len(won)} by {kind}" for kind, won in by.items())
        alarm = found[name]["alarm"]
        lines.append(
            f"{name}: above {alarm['threshold']:.2f}, {alarm['n_benign']} benign, left out {found[name]['left_out']}; "
            f"fires first in {counts}"
        )
    for name in (key for key in found if key.startswith("rows-")):
        lines.append(f"{name}: " + ", ".join(f"{key} {area[0]:.3f}" for key, area in found[name].items()))
    return "\n".join(lines)


def main(out: Path) -> None:
    results = gather(out)
    write_json(HERE / "results.json", results)
    for name, lm in results.items():
        print(name, behaviour(lm["organisms"]), *(studies(*one) for one in lm["seeds"].items()), sep="\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
