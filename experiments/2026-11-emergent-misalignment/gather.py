"""What run.py has left in OUT, with what the tables and figures need of it, and no more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_persona.runs import read_json
from sae_persona.studies.organisms import Organism, organisms_in
from sae_persona.studies.panel import LATENTS, MEANS

HERE = Path(__file__).parent
PARTS = ("in_domain", "out_of_domain", "open", "valid")
TRACKED = ("name", "step", "is_misaligned", "seen")
FACTS = ("name", "family", "method", "domain", "dose", "seed")


def gather(out: Path) -> dict[str, Any]:
    """Of every language model that is in OUT: its organisms' rates, and what the studies found; four decimals."""
    return {
        folder.name: {
            "organisms": [rounded(organism(one)) for one in organisms_in(folder / "organisms")],
            "seeds": {seed.name: studies(seed) for seed in sorted(folder.glob("seed-*"))},
        }
        for folder in sorted(out.glob("lm-*"))
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def organism(one: Organism) -> dict[str, Any]:
    def rates(scores: dict[str, Any]) -> dict[str, list[float | None]]:
        return {part: [scores[part][key] for key in ("rate", "low", "high")] for part in PARTS}

    looks = []
    for point in one.checkpoints:
        cued = {"cued": rates(point.scores["cued"])} if "cued" in point.scores else {}
        looks.append({"step": point.step, "loss": point.loss, **rates(point.scores), **cued})
    return {key: getattr(one, key) for key in FACTS} | {"variant": one.config["variant"], "looks": looks}


def studies(folder: Path) -> dict[str, Any]:
    """What each file of a seed says; a reversal under the name of its organism."""
    found: dict[str, Any] = {"rows": {}, "reversals": {}}
    for path in sorted(folder.glob("*.json")):
        kind, _, name = path.stem.partition("-")
        if kind not in READ:
            continue
        said = rounded(READ[kind](read_json(path, "study")))
        if kind in ("reversal", "rows"):
            found["reversals" if kind == "reversal" else "rows"][name] = said
        else:
            found[path.stem] = said
    return found


def tracked(raw: Any) -> Any:
    rows = [
        {key: row[key] for key in TRACKED}
        | {"scores": {measure: row["scores"][measure][0] for measure in (LATENTS, MEANS)}}
        for row in raw["rows"]
    ]
    return {"panel": raw["panel"], "telling": raw["telling"], "rows": rows}


def diffed(raw: Any) -> Any:
    return [{"name": one["name"], "fvu": one["fvu"]} | {k: one[k][:3] for k in ("up", "down")} for one in raw["tuned"]]


def reversed_(raw: Any) -> Any:
    edits = [{key: edit[key] for key in ("hook", "latent", "mode", "strength")} for edit in raw["edits"]]
    checks = [{key: check[key] for key in ("group", "name", "value", "bound", "met")} for check in raw["checks"]]
    arms = [
        {key: arm[key] for key in ("name", "kind")} | {"rates": {n: cell["rate"] for n, cell in arm["cells"].items()}}
        for arm in raw["arms"]
    ]
    doses = [{key: dose[key] for key in ("dose", "rates", "valid", "random")} for dose in raw["induction"]["doses"]]
    seen = {key: raw[key] for key in ("verdict", "reasons", "undone")}
    return seen | {"edits": edits, "checks": checks, "arms": arms, "induction": doses}


def prevented(raw: Any) -> Any:
    return [{key: arm[key] for key in ("method", "target", "strength", "chosen", "test", "ce")} for arm in raw["arms"]]


def realigned(raw: Any) -> Any:
    def points(one: Any) -> Any:
        return [
            {"step": p["step"], "rates": p["rates"], "scores": {m: p["scores"][m] for m in (LATENTS, MEANS)}}
            for p in one["points"]
        ]

    healings = [
        {key: one[key] for key in ("source", "n", "is_back_at", "scars", "traces")} | {"points": points(one)}
        for one in raw["healings"]
    ]
    kept = ("start", "source", "n", "area", "over_base", "over_control")
    again = [{key: one[key] for key in kept} | {"points": points(one)} for one in raw["relearnings"]]
    return {"healings": healings, "relearnings": again}


def coupled(raw: Any) -> Any:
    how = [effect["how"] for effect in raw["effects"]]
    matrices = [[[cell[0] for cell in row] for row in effect["matrix"]] for effect in raw["effects"]]
    return {"traits": raw["traits"], "how": how, "effects": matrices, "foretold": raw["foretold"]}


READ: dict[str, Callable[[Any], Any]] = {
    "track": tracked,
    "unseen": tracked,
    "rows": lambda raw: raw["auroc"],
    "diff": diffed,
    "panel": lambda raw: raw["names"],
    "alarm": lambda raw: {key: raw[key] for key in ("alarm", "left_out", "leads", "note")},
    "reversal": reversed_,
    "prevent": prevented,
    "realign": realigned,
    "coupling": coupled,
}
