"""Tables, from what the commands printed. `python tables.py RESULTS` makes them again."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from data import CLASSES, PATTERNS
from scipy.stats import spearmanr

LEVEL = 0.05
TOP = 10
Row = dict[str, Any]


def write_tables(results: Path, out: Path) -> None:
    """Every table as CSV in ``out``."""
    ranked = {path.stem.removeprefix("rank-"): _by_persona(path) for path in sorted(results.glob("rank-*.json"))}
    tables = {
        "rankings": [_of_ranking(name, one) for name, by in ranked.items() for one in by.values()],
        "stability": _stability(results),
        "screens": [row for path in sorted(results.glob("screen-*.json")) for row in _screen(path)],
        "emotions_on_statements": _emotions(ranked["a-plain"], ranked["statements-pre"]),
        "statements_to_answers": _transfer(ranked["statements-pre"], ranked["answers-mean"]),
        "words": [_words(name, ranked["a-plain"][name], results) for name in CLASSES],
    }
    for name, rows in tables.items():
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _by_persona(path: Path) -> dict[str, Row]:
    return {one["persona"]: one for one in json.loads(path.read_text(encoding="utf-8"))}


def _oriented(row: Row, part: str) -> float:
    """AUROC in the direction that the ranking found on train."""
    return row[part][0] if row["z"] > 0 else 1 - row[part][0]


def _tells(row: Row) -> bool:
    """Max-T over all latents, and again on held-out examples alone."""
    return row["p_max_t"] <= LEVEL and row["held_out_p"] <= LEVEL


def _of_ranking(name: str, ranking: Row) -> Row:
    rows, dense = ranking["rows"], {one["name"].split()[0]: one for one in ranking["dense"]}
    first, best = rows[0], max(rows, key=lambda row: _oriented(row, "auroc"))
    told = [row for row in rows if row["p_max_t"] <= LEVEL]
    holds = [row for row in told if row["held_out_p"] <= LEVEL]
    return {
        "ranking": name,
        "persona": ranking["persona"],
        "with": ranking["n_held_out"][0],
        "without": ranking["n_held_out"][1],
        "tested": ranking["n_tested"],
        "max-T": len(told),
        "and held-out": len(holds),
        "of those AUROC >= .6": sum(_oriented(row, "held_out_auroc") >= 0.6 for row in holds),
        "first": first["latent"],
        "z": round(first["z"], 1),
        "z alone": round(first["unadjusted_z"], 1),
        "held-out partial r": round(first["held_out_partial"][0], 3),
        "templates agree": f"{round((first['agreement'] or 0) * first['n_templates'])}/{first['n_templates']}",
        "template AUROCs": f"{first['template_low'] or 0:.2f}-{first['template_high'] or 0:.2f}",
        "best": best["latent"],
        "AUROC": _interval(best["held_out_auroc"], best["z"] < 0),
        "means": _interval(dense["difference"]["held_out_auroc"]),
        "probe": _interval(dense["logistic"]["held_out_auroc"]),
        "PCA": _interval(dense["PCA"]["held_out_auroc"]),
        "random latents": f"{ranking['random']['mean']:.3f}, {ranking['random']['p95']:.3f}",
        "random directions": f"{ranking['random_directions']['mean']:.3f}, {ranking['random_directions']['p95']:.3f}",
    }


def _interval(auroc: list[float], falls: bool = False) -> str:
    value, low, high = (1 - auroc[0], 1 - auroc[2], 1 - auroc[1]) if falls else auroc
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _stability(results: Path) -> list[Row]:
    rows = []
    for name in CLASSES:
        for one in json.loads((results / f"stability-{name}.json").read_text(encoding="utf-8"))["comparisons"]:
            numbers = ("matched", "matched_random", "survives", "spearman", "subspace", "subspace_random", "subspace_p")
            first = one["matches"][0]
            rows.append(
                {"persona": name, "from": one["a"], "to": one["b"]}
                | {key: round(one[key], 3) for key in numbers if one[key] is not None}
                | {"survival": one["survival"], "first": first["latent"], "nearest": first["nearest"]}
                | {"cosine": round(first["cosine"], 3), "its place": first["other_rank"]}
            )
    return rows


def _screen(path: Path) -> list[Row]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return [
        {
            "persona": found["persona"],
            "rank": row["rank"],
            "latent": row["latent"],
            "direction": row["direction"],
            "fires": round(row["fires"], 3),
            "effect of ablation, nats": " ".join(f"{x:+.3f}" for x in row["effect"]),
            "p random": round(row["p_random"], 3),
            "estimate": round(row["estimate"], 3),
            "verdict": row["verdict"],
        }
        for row in found["rows"]
    ]


def _emotions(emotions: dict[str, Row], statements: dict[str, Row]) -> list[Row]:
    """How the ten best latents of each label do in the rankings of statements, beside all latents tested there."""
    rows = []
    for emotion, ranking in emotions.items():
        best = [row["latent"] for row in ranking["rows"] if _tells(row)][:TOP]
        for persona, other in statements.items():
            there = {row["latent"]: row for row in other["rows"]}
            found = [there[latent] for latent in best if latent in there]
            top = max(found, key=lambda row: abs(row["z"]))
            rows.append(
                {
                    "label": emotion,
                    "persona": persona,
                    "tested": f"{len(found)} of {len(best)}",
                    "tell": sum(map(_tells, found)),
                    "of all": round(float(np.mean([_tells(row) for row in there.values()])), 3),
                    "strongest": top["latent"],
                    "its place": other["rows"].index(top) + 1,
                    "its sign": "+" if top["z"] > 0 else "-",
                    "its AUROC": _interval(top["held_out_auroc"]),
                    "first's z": round(there[best[0]]["z"], 1) if best[0] in there else "",
                }
            )
    return rows


def _transfer(statements: dict[str, Row], answers: dict[str, Row]) -> list[Row]:
    """What a ranking on statements says of answers. "both": in the same direction after Yes and after No."""
    rows = []
    for persona, ranking in statements.items():
        there = {row["latent"]: row for row in answers[persona]["rows"]}
        best = [row for row in ranking["rows"] if _tells(row)][:TOP]
        found = [(row, there[row["latent"]]) for row in best if row["latent"] in there]
        shared = [(row["z"], there[row["latent"]]["z"]) for row in ranking["rows"] if row["latent"] in there]
        dense = {one["name"].split()[0]: one for one in answers[persona]["dense"]}
        rows.append(
            {
                "persona": persona,
                "first on statements": best[0]["latent"],
                "its AUROC there": _interval(best[0]["held_out_auroc"], best[0]["z"] < 0),
                "best ten": len(best),
                "tested on answers": len(found),
                "told, same sign": sum(_tells(b) and a["z"] * b["z"] > 0 for a, b in found),
                "told, other sign": sum(_tells(b) and a["z"] * b["z"] < 0 for a, b in found),
                "same sign, both": sum(_tells(b) and a["z"] * b["z"] > 0 and b["agreement"] == 1 for a, b in found),
                "told of all": round(float(np.mean([_tells(row) for row in there.values()])), 3),
                "both of those": round(
                    float(np.mean([row["agreement"] == 1 for row in there.values() if _tells(row)] or [0])), 3
                ),
                "spearman of z": round(float(spearmanr(*zip(*shared, strict=True)).statistic), 3),
                "latents in both": len(shared),
                "first on answers": answers[persona]["rows"][0]["latent"],
                "its AUROC": _interval(
                    answers[persona]["rows"][0]["held_out_auroc"], answers[persona]["rows"][0]["z"] < 0
                ),
                "probe on answers": _interval(dense["logistic"]["held_out_auroc"]),
            }
        )
    return rows


def _words(name: str, ranking: Row, results: Path) -> Row:
    """Do latents promote words of the label's list, and are they what a search by its name finds?"""
    told = json.loads((results / f"describe-{name}.json").read_text(encoding="utf-8"))
    rises = {row["latent"] for row in ranking["rows"] if row["z"] > 0}
    hits = [hit["latent"] for hit in json.loads((results / f"search-{name}.json").read_text(encoding="utf-8"))]
    places = {row["latent"]: place for place, row in enumerate(ranking["rows"], start=1)}
    told = [one for one in told if one["latent"] in rises]
    holds = [row["latent"] for row in ranking["rows"] if _tells(row) and row["z"] > 0]
    return {
        "label": name,
        "rising of the ten best": len(told),
        "promote a word of its list": sum(_promotes(one, name) for one in told),
        "of another list": round(
            float(np.mean([sum(_promotes(one, other) for one in told) for other in CLASSES if other != name])), 2
        ),
        "found by its name": len(hits),
        "of these tested": sum(latent in places for latent in hits),
        "tell it, rising": sum(latent in holds for latent in hits),
        "expected": round(len(hits) * len(holds) / 1024, 2),
        "best place": min((places[latent] for latent in hits if latent in holds), default=""),
        "first promotes": " ".join(token.strip() for token, _ in told[0]["promoted"][:6]) if told else "",
        "first's input score": told[0]["input_score"] if told else "",
    }


def _promotes(description: Row, name: str) -> bool:
    return any(PATTERNS[name].fullmatch(token.strip()) for token, _ in description["promoted"])


if __name__ == "__main__":
    write_tables(Path(sys.argv[1]), Path(__file__).parent)
