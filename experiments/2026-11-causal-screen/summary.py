"""Print the README's tables from results.json: python experiments/2026-11-causal-screen/summary.py"""

import json
from pathlib import Path
from typing import Any

ESTIMATES = ("gradient", "integrated", "delta")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def where(one: dict[str, Any]) -> str:
    return f"{one['persona']}, {one['positions']}"


def agreement(one: dict[str, Any], estimate: str, split: str) -> str:
    value, low, high, _ = one["screen"]["agreement"][f"{estimate}, {split}"]
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def causal(one: dict[str, Any]) -> list[str]:
    verdicts, (latent, value, low, high, p, _) = one["screen"]["verdicts"], one["screen"]["best"][0]
    counts = [str(verdicts.get(name, 0)) for name in ("causal", "opposite", "associated only", "silent", "no")]
    n, p95 = one["screen"]["controls"]
    return [*counts, str(one["screen"]["effect only"]), f"{latent}: {value:+.2f} [{low:+.2f}, {high:+.2f}], p {p:.2f}",
            f"{n}, {p95:.2f}"]  # fmt: skip


def baselines(one: dict[str, Any]) -> list[str]:
    base = one["baselines"]
    names = ("best latent", "difference of means", "logistic probe", "PCA direction")
    random = [f"{base[name]['mean']:.2f}, {base[name]['p95']:.2f}" for name in ("random latents", "random directions")]
    return [*(f"{base[name]:.3f}" for name in names), *random]


def stable(one: dict[str, Any]) -> list[str]:
    rows = one["stability"]

    def span(name: str, digits: int = 2) -> str:
        values = [row[name] for row in rows]
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    verdicts = [row["survival"] for row in rows]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in dict.fromkeys(sorted(verdicts)))
    return [*(span(name) for name in ("matched", "matched_random", "survives", "subspace", "subspace_random")), counts]


def main() -> None:
    results = json.loads(Path(__file__).with_name("results.json").read_text(encoding="utf-8"))
    for split in ("held_out", "train"):
        rows = [[where(one), *(agreement(one, name, split) for name in ESTIMATES)] for one in results]
        print(f"estimates from {split} pairs\n\n{table(['persona, tokens', *ESTIMATES], rows)}\n")
    heads = ["persona, tokens", "causal", "opposite", "associated only", "silent", "no", "effect only", "best-ranked"]
    print(table([*heads, "controls, p95"], [[where(one), *causal(one)] for one in results]), "\n")
    heads = ["persona, tokens", "best latent", "means", "probe", "PCA", "random latents", "random directions"]
    print(table(heads, [[where(one), *baselines(one)] for one in results]), "\n")
    heads = ["persona, tokens", "matched", "all latents", "survive", "subspace", "random", "verdicts of 6"]
    print(table(heads, [[where(one), *stable(one)] for one in results]))


if __name__ == "__main__":
    main()
