"""Searching a dictionary of 131,072 features on a CPU: text queries, direction queries, and making the indexes.

    python -m experiments.bench.search [--latents 131072] [--widths 2304,4096] [--threads 2] [--out experiments/bench]

The features are made up: eight contexts of 25 words each, words by Zipf's law out of 50,000, a topic word in every
context of a latent; an explanation of 12 words and 20 tokens beside. A text query is timed as a user meets it:
`find_words` with a limit of 20 and what is shown of those 20. Decoder rows are Gaussian, the hardest case, since no
neighbours stand out; they are held in memory, which takes the place of the page cache. Answers are compared with all
cosines in fp64 before anything is timed. Beside the time on the clock stands that of the CPU (text: of its one thread;
directions: of all together), which other work on the machine changes less. Appends a row to <out>/search_results.csv;
needs 0.6 GB of disk in --folder for its duration.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from experiments.bench import ledger
from sae_persona.features.descriptions import Description
from sae_persona.features.dictionary import Dictionary, write_dictionary
from sae_persona.features.directions import Directions
from sae_persona.features.readable import ContextText
from sae_persona.features.search import find_words
from sae_persona.features.stats import LatentStats
from sae_persona.types import SparseLatents

WORDS, CONTEXTS, LENGTH, LIMIT = 50_000, 8, 25, 20
PEAK = 12  # the topic's word in a context


def vocabulary(random: np.random.Generator) -> list[str]:
    """Words of letters as frequent as in English, short ones first."""
    letters, found = list("etaoinshrdlucmfwypvbgkjqxz"), set()
    while len(found) < WORDS:
        places = np.minimum(random.geometric(0.12, random.integers(2, 10)) - 1, len(letters) - 1)
        found.add("".join(letters[i] for i in places))
    return sorted(found, key=lambda word: (len(word), word))


def texts(n: int, words: list[str], random: np.random.Generator) -> Iterator[tuple[list[ContextText], Description]]:
    share = 1 / np.arange(1, WORDS + 1) ** 1.05
    cumulative = np.cumsum(share / share.sum())
    for _ in range(n):
        drawn = np.minimum(np.searchsorted(cumulative, random.random((CONTEXTS, LENGTH + 4))), WORDS - 1)
        topic = int(random.integers(WORDS))
        drawn[:, PEAK] = topic
        shown = []
        for row in drawn[:, :LENGTH]:
            before = sum(len(words[i]) + 1 for i in row[:PEAK])
            text = " ".join(words[i] for i in row)
            shown.append(ContextText(text, before, before + len(words[topic]), 1.0))
        beside = [words[i] for i in drawn[:, LENGTH:].ravel()]
        yield shown, _about(words[topic], beside)


def _about(topic: str, beside: list[str]) -> Description:
    promoted, suppressed = (tuple((word, 1.0) for word in part) for part in (beside[12:22], beside[22:]))
    explanation = " ".join([topic, *beside[:12]])
    return Description(latent=0, explanation=explanation, promoted=promoted, suppressed=suppressed)


def queries(words: list[str], random: np.random.Generator) -> dict[str, list[str]]:
    """By kind: words of all frequencies, ranks drawn evenly in their logarithm; so of phrases and the others."""

    def word() -> str:
        return words[int(WORDS ** random.random()) - 1]

    return {
        "word": [f'"{word()}"' for _ in range(60)],
        "two words": [f'"{word()}" "{word()}"' for _ in range(40)],
        "prefix": [f"{prefix}*" for prefix in (w[: int(random.integers(2, 5))] for w in random.choice(words, 40))],
        "phrase": [f'"{word()} {word()}"' for _ in range(40)],
        "either": [f'"{word()}" OR "{word()}"' for _ in range(20)],
        "most common": [f'"{w}"' for w in words[:5]] + [f'"{words[0]} {words[1]}"', f'"{words[0]}" "{words[1]}"'],
    }


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds."""
    start = clock()
    call()
    return (clock() - start) * 1e3


def text_part(n: int, folder: Path) -> dict[str, object]:
    random = np.random.default_rng(0)
    words = vocabulary(random)
    stats = LatentStats(n)
    stats.update(SparseLatents(torch.ones(n, 1), torch.arange(n)[:, None]))
    both = texts(n, words, random)
    descriptions: dict[int, Description] = {}

    def contexts() -> Iterator[list[ContextText]]:
        for latent, (shown, about) in enumerate(both):
            descriptions[latent] = about
            yield shown
            del descriptions[latent]

    path = folder / "search.sqlite"
    build = timed(lambda: write_dictionary(path, stats, contexts(), descriptions, {}))
    dictionary = Dictionary.open(path)

    def ask(query: str) -> None:
        dictionary.entries(find_words(dictionary, query, LIMIT).latents, query)

    row: dict[str, object] = {"text_build_s": round(build / 1e3, 1), "text_mb": round(path.stat().st_size / 1e6)}
    times: dict[str, list[float]] = {}
    cpu: list[float] = []
    for kind, asked in queries(words, random).items():
        for query in asked:
            ask(query)  # from the page cache from here on, as in a session
            times.setdefault(kind, []).append(min(timed(lambda q=query: ask(q)) for _ in range(3)))
            if kind != "most common":
                cpu.append(min(timed(lambda q=query: ask(q), time.thread_time) for _ in range(3)))
        print(kind, f"median {np.median(times[kind]):.1f} p95 {np.quantile(times[kind], 0.95):.1f} ms", flush=True)
    mixed = [value for kind, values in times.items() if kind != "most common" for value in values]
    row |= {"text_ms_p50": round(float(np.median(mixed)), 2), "text_ms_p95": round(float(np.quantile(mixed, 0.95)), 1)}
    row |= {
        "text_cpu_ms_p50": round(float(np.median(cpu)), 2),
        "text_cpu_ms_p95": round(float(np.quantile(cpu, 0.95)), 1),
    }
    row |= {"prefix_ms_p95": round(float(np.quantile(times["prefix"], 0.95)), 1)}
    row |= {"phrase_ms_p95": round(float(np.quantile(times["phrase"], 0.95)), 1)}
    row |= {"common_ms_max": round(max(times["most common"]), 1)}
    path.unlink()
    return row


def direction_part(n: int, d: int, folder: Path, rounds: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.empty(n, d)
    for part in rows.split(8192):
        part.normal_(generator=generator)
    path = folder / "directions.safetensors"
    build = timed(lambda: Directions.of(rows).save(path, {}))
    found = Directions.open(path, rows)
    query = torch.randn(d, generator=generator)
    best, whole = found.top(query, LIMIT)[0], found.cosines(query)
    if (best != np.argsort(-whole, kind="stable")[:LIMIT]).any():
        raise SystemExit("RED: the nearest directions are not those of all cosines")
    asked = [torch.randn(d, generator=generator) for _ in range(rounds)]
    ours = [timed(lambda q=q: found.top(q, LIMIT)) for q in asked]
    cpu = [timed(lambda q=q: found.top(q, LIMIT), time.process_time) for q in asked]
    like = [timed(lambda i=i: found.top(rows[i] + 0.5 * rows[i + 1], LIMIT)) for i in range(rounds)]
    plain = [timed(lambda q=q: torch.mv(rows, q).topk(LIMIT)) for q in asked]
    print(f"width {d}: {np.median(ours):.0f} ms, plain fp32 {np.median(plain):.0f} ms", flush=True)
    size = path.stat().st_size / 1e6
    path.unlink()
    values = {"ms_p50": np.median(ours), "ms_p95": np.quantile(ours, 0.95), "cpu_ms_p50": np.median(cpu)}
    values["like_ms_p50"] = np.median(like)
    values |= {"fp32_ms_p50": np.median(plain), "build_s": build / 1e3, "mb": size}
    return {f"d{d}_{name}": round(float(value), 1) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=131_072)
    parser.add_argument("--widths", default="2304,4096")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    row: dict[str, object] = {"commit": ledger.commit(), "date": datetime.now(UTC).date().isoformat()}
    row |= {"cores": os.cpu_count(), "threads": a.threads, "load": round(os.getloadavg()[0], 1), "latents": a.latents}
    folder = Path(tempfile.mkdtemp(dir=a.folder))
    try:
        row |= text_part(a.latents, folder)
        for width in map(int, a.widths.split(",")):
            row |= direction_part(a.latents, width, folder, a.rounds)
    finally:
        shutil.rmtree(folder)
    row["load_end"] = round(os.getloadavg()[0], 1)
    print(row)
    ledger.append(a.out / "search_results.csv", row)


if __name__ == "__main__":
    main()
