"""Draw gpu_results.csv: milliseconds of a training step against the width of the dictionary.

    python -m experiments.bench.chart [--results experiments/bench/gpu_results.csv] [--out experiments/bench/step.png]

Of each shape and mode the newest row counts. Hollow points are of ../shared/design/performance.md: the same shapes,
data and kind of card, but another run, so that differences of a fifth mean nothing.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from experiments.bench import ledger, modes

# TopK over the whole dictionary, as `exact`: what may be called our best
OURS = [name for name, mode in modes.EVERY.items() if mode.is_topk and mode.clip is None and name != "fp32"]
ANOTHER_RUN = {"OpenAI, bf16": (4.18, 15.70, 43.63), "SAELens, bf16": (14.61, 56.40, 159.33)}
LINES = {  # name: colour, marker, line, text
    "plain_dense": ("#8c6d31", "s", "-", "plain PyTorch"),
    "exact": ("#1f4e9c", "o", "-", "ours, exact"),
    "best": ("#c2410c", "D", "-", "ours, fastest mode"),
    "floor": ("#555555", "", "--", "floor: bf16 product + fp32 Adam traffic"),
}
Points = dict[int, float]


def newest(rows: list[dict[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    """The last row of each shape and mode."""
    return {(row["shape"], row["mode"]): row for row in rows}


def lines(rows: list[dict[str, str]], k: int, batch: int) -> tuple[dict[str, Points], dict[int, str]]:
    """Milliseconds by n_latents of each line at S, M and L, and which mode was the fastest."""
    found: dict[str, Points] = {name: {} for name in LINES}
    fastest: dict[int, str] = {}
    latest = newest(rows)
    for d_in, n_latents in modes.SHAPES.values():
        shape = str(modes.Shape(d_in, n_latents, k, batch))
        here = {mode: row for (at, mode), row in latest.items() if at == shape}
        for name in ("plain_dense", "exact"):
            if name in here:
                found[name][n_latents] = float(here[name]["ms_p50"])
        ours = {name: float(here[name]["ms_p50"]) for name in OURS if name in here}
        if ours:
            fastest[n_latents] = min(ours, key=lambda name: ours[name])
            found["best"][n_latents] = ours[fastest[n_latents]]
            found["floor"][n_latents] = float(here.get("exact", here[fastest[n_latents]])["floor_ms"])
    return found, fastest


def draw(ax: Axes, found: dict[str, Points], fastest: dict[int, str], *, another_run: bool) -> None:
    widths = [n_latents for _, n_latents in modes.SHAPES.values()]
    if another_run:
        for (name, ms), marker in zip(ANOTHER_RUN.items(), "^v", strict=True):
            ax.plot(widths, ms, marker, color="#777777", mfc="none", ms=8, label=f"{name} (measured in another run)")
    for name, (colour, marker, style, text) in LINES.items():
        if found[name]:
            ax.plot(
                found[name].keys(), found[name].values(), style, marker=marker, color=colour, lw=2, ms=6, label=text
            )
    for name in ("plain_dense", "exact", "best"):
        for at, (n_latents, ms) in enumerate(found[name].items()):
            words, shift, align = f"{ms:.3g}", (-4, 8), "right"
            if name == "best":  # below the line, and at the first point left of it, where the floor is not
                words += f" ({fastest[n_latents]})"
                shift, align = ((-9, -5), "right") if at == 0 else ((8, -12), "left")
            colour = LINES[name][0]
            ax.annotate(words, (n_latents, ms), shift, textcoords="offset points", ha=align, color=colour, fontsize=9)
    ax.set(xscale="log", yscale="log", xlabel="latents in the dictionary", ylabel="milliseconds a step")
    ax.set_xlim(widths[0] / 1.7, widths[-1] * 1.5)
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5)]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    ax.set_ylim(low / 1.3, high * 1.1)
    ax.xaxis.set_major_locator(FixedLocator(widths))
    shapes = {n_latents: f"{n_latents:,}\n{name}: {d_in:,} wide" for name, (d_in, n_latents) in modes.SHAPES.items()}
    ax.xaxis.set_major_formatter(FuncFormatter(lambda at, _: shapes[round(at)]))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(FixedLocator([]))
        axis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y", color="#e5e5e5", lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--results", type=Path, default=here / "gpu_results.csv")
    parser.add_argument("--out", type=Path, default=here / "step.png")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--n", type=int, default=8192)
    a = parser.parse_args()
    rows = ledger.read(a.results)
    found, fastest = lines(rows, a.k, a.n)
    if not found["exact"]:
        parser.error(f"{a.results} has no row of the mode exact at S, M or L with k={a.k} batch={a.n}")
    figure, ax = plt.subplots(figsize=(10, 6.5), dpi=100, layout="constrained")
    draw(ax, found, fastest, another_run=(a.k, a.n) == (32, 8192))
    shapes = {str(modes.Shape(d_in, n_latents, a.k, a.n)) for d_in, n_latents in modes.SHAPES.values()}
    drawn = [row for (shape, _), row in newest(rows).items() if shape in shapes]
    cards, commits = (", ".join(dict.fromkeys(row[key] for row in drawn)) for key in ("gpu", "commit"))
    ax.set_title(f"One training step, {a.n:,} tokens, k = {a.k}\n{cards}, commit {commits}", loc="left", fontsize=11)
    figure.savefig(a.out)
    print(f"{a.out}: {', '.join(f'{n:,} {name}' for n, name in fastest.items())} the fastest")


if __name__ == "__main__":
    main()
