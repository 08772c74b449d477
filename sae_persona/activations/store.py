"""Activations kept on disk in the order of the texts, so that many trainings share one pass of the model.

    STORE/store.json            format, model, hook points, how the texts were read, and a line a shard
    STORE/shard-00000.h5        one data set [rows, d_in] a hook point, named by it; immutable

A shard is written under a temporary name, flushed, renamed, and only then entered in store.json: a killed writer loses
at most the shard in hand, and goes on after the last one. bf16 is kept as uint16 with an attribute. The rows of a data
set lie in one piece and are not compressed: so they are read about as fast as the disk gives them; in chunks it took
two to four times as long.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from sae_persona.activations.ahead import ahead
from sae_persona.activations.sequences import Place
from sae_persona.activations.shuffle import Chunk, Rows
from sae_persona.errors import DataError, FormatError, RunError
from sae_persona.runs import read_json, write_json, write_whole
from sae_persona.types import HookPoint

FORMAT = 1
RECORD = "store.json"
READ_BYTES = 64 << 20  # read at once
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """An entry of store.json.

    sums    SHA-256 of the rows, by hook point
    place   of the chunk in the texts in which the next shard begins, after ``taken`` of its rows
    """

    name: str
    rows: int
    bytes: int
    sums: dict[str, str]
    place: list[int]
    taken: int


class Store:
    """A store that is there. RunError or FormatError if it is not one of ours.

    facts      what its activations are: model, hooks, dtype, d_in, and how texts were read
    complete   the texts ended; False while a writer is at work, or was killed
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise RunError(f"no activation store at {path}: `sae-persona cache` makes one")
        if not (self.path / RECORD).is_file():
            raise FormatError(f"{path} is no activation store, it has no {RECORD}: `sae-persona cache` makes one")
        record = read_json(self.path / RECORD, "activation store")
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            found = record.get("format") if isinstance(record, dict) else None
            raise FormatError(f"{path} has store format {found}, this version reads {FORMAT}: cache it again")
        self.facts: dict[str, Any] = record["facts"]
        self.complete: bool = record["complete"]
        self.shards = [Shard(**shard) for shard in record["shards"]]

    @staticmethod
    def is_at(path: str | Path) -> bool:
        """Whether a folder is a store."""
        return (Path(path) / RECORD).is_file()

    @property
    def hooks(self) -> tuple[HookPoint, ...]:
        return tuple(HookPoint.parse(text) for text in self.facts["hooks"])

    @property
    def d_in(self) -> int:
        return self.facts["d_in"]

    def n_rows(self) -> int:
        """Activations at each hook point."""
        return sum(shard.rows for shard in self.shards)

    def check(self) -> None:
        """Look at sizes alone: FormatError for a shard that is missing, cut short or longer than it was."""
        for shard in self.shards:
            path = self.path / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes of {shard.bytes}"
                raise FormatError(f"{path} {found}: cache it again, or pass --skip-bad to go without it")

    def verify(self) -> list[str]:
        """Read everything: what is wrong with each bad shard, in words."""
        return [f"{self.path / shard.name}: {wrong}" for shard in self.shards if (wrong := self.wrong(shard))]

    def rows(self, shard: Shard, hooks: Sequence[HookPoint]) -> Iterator[Rows]:
        """The rows of a shard by hook point, in blocks of about 64 MB. FormatError if it cannot be read."""
        path, dtype = self.path / shard.name, DTYPES[self.facts["dtype"]]
        block = max(1, READ_BYTES // (self.d_in * dtype.itemsize * max(1, len(hooks))))
        try:
            with h5py.File(path, "r") as file:
                sets: dict[str, Any] = {str(hook): file[str(hook)] for hook in hooks}
                for at in range(0, shard.rows, block):
                    n = min(block, shard.rows - at)
                    yield {name: _read(data, at, n, dtype) for name, data in sets.items()}
        except (OSError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0].strip("'\"")
            raise FormatError(
                f"{path} cannot be read ({reason}): `sae-persona cache verify` names bad shards"
            ) from error

    def wrong(self, shard: Shard) -> str | None:
        """What is wrong with a shard, by reading it; None if nothing is."""
        sums = {str(hook): sha256() for hook in self.hooks}
        try:
            for rows in self.rows(shard, self.hooks):
                for name, x in rows.items():
                    sums[name].update(_raw(x))
        except FormatError as error:
            return str(error)
        bad = [name for name, digest in sums.items() if digest.hexdigest() != shard.sums.get(name)]
        return f"the activations at {', '.join(bad)} are not those that were written" if bad else None


class FromStore:
    """Rows of activations out of a store, as a `Stream` takes them, in the order in which the model gave them.

    hooks      those wanted; DataError for one that the store does not have
    share      (rank, world): take every so manieth shard, where several processes read
    skip_bad   go without shards that cannot be read; otherwise FormatError names them

    DataError for a store that is not complete, if ``skip_bad`` does not say that this is known.
    """

    def __init__(
        self, store: Store, hooks: Sequence[HookPoint], *, device: torch.device, n_ahead: int,
        share: tuple[int, int] = (0, 1), skip_bad: bool = False,
    ) -> None:  # fmt: skip
        if absent := [str(hook) for hook in hooks if hook not in store.hooks]:
            has = ", ".join(map(str, store.hooks))
            raise DataError(f"{store.path} has no activations at {', '.join(absent)}: it has {has}")
        if not store.complete and not skip_bad:
            raise DataError(
                f"{store.path} is not complete: `sae-persona cache ... --resume` goes on, --skip-bad takes it as it is"
            )
        self.store, self.hooks, self.device, self.n_ahead = store, tuple(hooks), device, n_ahead
        self.d_in = store.d_in
        self._shards = store.shards[share[0] :: share[1]]
        self._bad: set[str] = set()
        if skip_bad:
            self._bad = {shard.name for shard in self._shards if store.wrong(shard)}
        else:
            store.check()
        if not any(shard.name not in self._bad for shard in self._shards):
            raise DataError(
                f"{store.path} has {len(store.shards)} shards, none of them for process {share[0]}: use fewer"
            )

    @property
    def skipped(self) -> list[str]:
        """Names of the shards that are left out."""
        return sorted(self._bad)

    def n_rows(self) -> int:
        return sum(shard.rows for shard in self._shards if shard.name not in self._bad)

    def chunks(self, start: Place) -> Iterator[Chunk]:
        """The text of a place is a shard, its piece a block of rows in it."""
        for chunk in ahead(self._blocks(start), self.n_ahead, self._pinned):
            rows = {name: x.to(self.device, non_blocking=True) for name, x in chunk.rows.items()}
            yield chunk._replace(rows=rows)

    def _blocks(self, start: Place) -> Iterator[Chunk]:
        for number, shard in enumerate(self._shards):
            if number < start.text or shard.name in self._bad:
                continue
            for piece, rows in enumerate(self.store.rows(shard, self.hooks)):
                place = Place(start.round, number, piece)
                if place >= start:
                    yield Chunk(place, place._replace(piece=piece + 1), rows)

    def _pinned(self, chunk: Chunk) -> Chunk:
        if self.device.type != "cuda":
            return chunk
        return chunk._replace(rows={name: x.pin_memory() for name, x in chunk.rows.items()})


class Writer:
    """Writes a store shard by shard.

    path          a new folder, or with ``resume`` a store that was begun with the same facts
    facts         JSON values; hooks, dtype and d_in among them
    shard_rows    activations a shard

    RunError if something else is at ``path``, the facts differ, or the disk refuses.
    """

    def __init__(self, path: Path, facts: dict[str, Any], *, shard_rows: int, resume: bool = False) -> None:
        self.path, self.facts, self.shard_rows = Path(path), json.loads(json.dumps(facts)), shard_rows
        self.shards: list[Shard] = []
        self.complete = False
        if resume:
            self._take_up(Store(self.path))
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{path} is there already: choose another --out, or pass --resume to go on with it")
        else:
            self._record()
        self._dtype = DTYPES[self.facts["dtype"]]

    @property
    def place(self) -> Place:
        """Of the chunk in which the next shard begins."""
        return Place(*self.shards[-1].place) if self.shards else Place()

    def write(self, chunks: Iterator[Chunk], on_rows: Callable[[int], object] = lambda n: None) -> Store:
        """Write all chunks, which begin at `place`; ``on_rows`` is told of each number of rows written."""
        source = _Cut(chunks, self.place, skip=self.shards[-1].taken if self.shards else 0)
        number, entered = len(self.shards), None
        try:
            # one shard goes to the disk while the next is filled
            with ThreadPoolExecutor(1) as disk:
                while not self.complete and source.more():
                    shard = self._fill(source, f"shard-{number:05}.h5", on_rows)
                    if entered is not None:
                        entered.result()
                    entered, number = disk.submit(self._enter, shard), number + 1
            if entered is not None:
                entered.result()
        except RunError:
            raise
        except (OSError, RuntimeError) as error:  # HDF5 raises the latter where a full disk keeps it from closing
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise RunError(f"cannot write {self.path}: {reason}. Free some space or choose another --out.") from error
        finally:
            for left in self.path.glob(".*.part"):
                left.unlink()
        self.complete = True
        self._record()
        return Store(self.path)

    def _fill(self, source: "_Cut", name: str, on_rows: Callable[[int], object]) -> Shard:
        """Write a shard under a temporary name; what will be its entry."""
        path, written = self._part(name), 0
        hashes = {hook: sha256() for hook in self.facts["hooks"]}
        with h5py.File(path, "w") as file, ThreadPoolExecutor(1) as hasher:
            sets = {hook: self._data_set(file, hook, self.shard_rows) for hook in hashes}
            for rows in source.up_to(self.shard_rows):
                n = len(next(iter(rows.values())))
                raw = {hook: _raw(rows[hook].cpu()) for hook in hashes}
                # sums are made beside the writing: neither holds Python's lock
                summed = hasher.submit(lambda raw=raw: [hashes[hook].update(raw[hook]) for hook in hashes])
                for hook, data in sets.items():
                    data[written : written + n] = raw[hook]
                summed.result()
                written += n
                on_rows(n)
        if written < self.shard_rows:  # the last one; a data set in one piece cannot shrink in its file
            self._shrink(path, written)
        sums = {hook: digest.hexdigest() for hook, digest in hashes.items()}
        place = list(source.place)
        return Shard(name=name, rows=written, bytes=path.stat().st_size, sums=sums, place=place, taken=source.taken)

    def _enter(self, shard: Shard) -> None:
        """Put a filled shard in its place, on the disk, and then in store.json."""
        write_whole(self.path / shard.name, lambda temporary: self._part(shard.name).rename(temporary))
        self.shards.append(shard)
        self._record()

    def _part(self, name: str) -> Path:
        return self.path / f".{name}.part"

    def _data_set(self, file: h5py.File, hook: str, rows: int) -> h5py.Dataset:
        kind = np.float32 if self._dtype == torch.float32 else np.uint16
        data = file.create_dataset(hook, (rows, self.facts["d_in"]), kind, fill_time="never")
        data.attrs["logical_dtype"] = self.facts["dtype"]
        return data

    def _shrink(self, path: Path, rows: int) -> None:
        """Write the file again with its first ``rows`` alone."""
        small = path.with_name(f"{path.name}.part")
        try:
            with h5py.File(path, "r") as file, h5py.File(small, "w") as new:
                for hook in self.facts["hooks"]:
                    old: Any = file[hook]
                    data = self._data_set(new, hook, rows)
                    block = max(1, READ_BYTES // (data.dtype.itemsize * data.shape[1]))
                    for at in range(0, rows, block):
                        data[at : at + block] = old[at : min(at + block, rows)]
            small.replace(path)
        finally:
            small.unlink(missing_ok=True)

    def _take_up(self, store: Store) -> None:
        changed = [key for key in {**store.facts, **self.facts} if store.facts.get(key) != self.facts.get(key)]
        if changed:
            what = "; ".join(f"{key} was {store.facts.get(key)}, now {self.facts.get(key)}" for key in sorted(changed))
            raise RunError(f"{self.path} was begun with other settings: {what}. Choose another --out")
        store.check()
        self.shards, self.complete = store.shards, store.complete

    def _record(self) -> None:
        shards = [asdict(shard) for shard in self.shards]
        record = {"format": FORMAT, "complete": self.complete, "facts": self.facts, "shards": shards}
        write_json(self.path / RECORD, record)


class _Cut:
    """The rows of chunks, so many at a time. ``place`` is of the chunk in hand, of which ``taken`` rows are given."""

    def __init__(self, chunks: Iterator[Chunk], place: Place, *, skip: int) -> None:
        self._chunks, self.place, self.taken = chunks, place, skip
        self._rows: Rows = {}
        self._n, self._end = 0, place
        self._next(skip)

    def more(self) -> bool:
        return self.taken < self._n

    def up_to(self, n: int) -> Iterator[Rows]:
        """The next ``n`` rows, or what there is."""
        while n and self.more():
            part = slice(self.taken, min(self.taken + n, self._n))
            yield {hook: rows[part] for hook, rows in self._rows.items()}
            n -= part.stop - part.start
            self.taken = part.stop
            if self.taken == self._n:
                self._next(0)

    def _next(self, taken: int) -> None:
        chunk = next(self._chunks, None)
        self.taken = taken
        if chunk is None:
            self._n, self.taken, self.place = 0, 0, self._end
        else:
            self._rows, self._end = chunk.rows, chunk.end
            self._n, self.place = len(next(iter(chunk.rows.values()))), chunk.start


def _read(data: h5py.Dataset, at: int, n: int, dtype: torch.dtype) -> Tensor:
    kept = np.empty((n, data.shape[1]), data.dtype)
    data.read_direct(kept, np.s_[at : at + n])
    x = torch.from_numpy(kept)
    return x if x.dtype == dtype else x.view(dtype)


def _raw(x: Tensor) -> Any:
    """The rows as numpy has them: fp32, or the bits of a half precision, which numpy need not know."""
    x = x.contiguous()
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.uint16).numpy()
