"""The activation store beside the disk: how fast it is written and read, as a share of plain sequential files.

    python -m experiments.bench.cache [--gb 4] [--folder DIR] [--out experiments/bench]

A file of the same bytes is written in blocks of 64 MB and flushed, then the store, in turns; files are dropped from the
page cache before they are read. Appends a row to <out>/cache_results.csv.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from experiments.bench import ledger
from sae_persona.activations.sequences import Place
from sae_persona.activations.shuffle import Chunk
from sae_persona.activations.store import Store, Writer

D_IN, ROWS, BLOCK = 4096, 8192, 64 << 20
HOOK = "layers.16.resid_post"


def chunks(n: int) -> Iterator[Chunk]:
    rows = torch.randn(ROWS, D_IN).bfloat16()
    for i in range(n):
        yield Chunk(Place(0, i), Place(0, i + 1), {HOOK: rows})


def timed_file(path: Path, n_bytes: int) -> float:
    block = os.urandom(BLOCK)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(n_bytes // BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    return n_bytes / (time.perf_counter() - start)


def dropped(path: Path) -> None:
    """Out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed_read(path: Path, n_bytes: int) -> float:
    dropped(path)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass
    return n_bytes / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    n = round(a.gb * 1e9 / (ROWS * D_IN * 2))
    n_bytes = n * ROWS * D_IN * 2
    folder = Path(tempfile.mkdtemp(dir=a.folder))
    found: dict[str, list[float]] = {name: [] for name in ("file_write", "store_write", "file_read", "store_read")}
    facts = {"hooks": [HOOK], "d_in": D_IN, "dtype": "bfloat16"}
    try:
        for _ in range(a.rounds):
            found["file_write"].append(timed_file(folder / "file", n_bytes))
            start = time.perf_counter()
            Writer(folder / "store", facts, shard_rows=4 * ROWS).write(chunks(n))
            found["store_write"].append(n_bytes / (time.perf_counter() - start))
            found["file_read"].append(timed_read(folder / "file", n_bytes))
            store = Store(folder / "store")
            for shard in store.shards:
                dropped(store.path / shard.name)
            start = time.perf_counter()
            for shard in store.shards:
                for _rows in store.rows(shard, store.hooks):
                    pass
            found["store_read"].append(n_bytes / (time.perf_counter() - start))
            shutil.rmtree(folder / "store")
    finally:
        shutil.rmtree(folder)
    rates = {f"{name}_mb_s": round(sorted(each)[len(each) // 2] / 1e6) for name, each in found.items()}
    row = {"commit": ledger.commit(), "date": datetime.now(UTC).date().isoformat(), "cores": os.cpu_count()}
    row |= {"load": round(os.getloadavg()[0], 1), "gb": round(n_bytes / 1e9, 2), "rounds": a.rounds, **rates}
    row["write_share"] = round(rates["store_write_mb_s"] / rates["file_write_mb_s"], 2)
    row["read_share"] = round(rates["store_read_mb_s"] / rates["file_read_mb_s"], 2)
    print(row)
    ledger.append(a.out / "cache_results.csv", row)


if __name__ == "__main__":
    main()
