"""A store gives the very batches that the model gave, and says so when it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch

from sae_persona.activations.sequences import Place
from sae_persona.activations.store import FromStore, Store, Writer
from sae_persona.activations.stream import FromModel, Stream, StreamConfig, layout_for, streams
from sae_persona.activations.texts import read_texts
from sae_persona.errors import DataError, FormatError, RunError
from sae_persona.types import HookPoint

HOOKS = [HookPoint(1), HookPoint(0, "resid_pre")]
TEXTS = read_texts([("some words, " * 9)[: 3 + 7 * i % 60] for i in range(60)])
CONFIG = StreamConfig(context_size=16, batch_tokens=8, buffer_tokens=64, lm_batch=2, passes=2)
CPU = torch.device("cpu")


def facts(lm, **changes):
    dtype = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
    return {"hooks": list(map(str, HOOKS)), "d_in": lm.d_model, "dtype": dtype, **changes}


def from_model(lm):
    return FromModel(lm, HOOKS, TEXTS, layout_for(lm, CONFIG), 0)


def written(lm, path, shard_rows=300):
    return Writer(path, facts(lm), shard_rows=shard_rows).write(from_model(lm).chunks(Place()))


def stored(store, **changes):
    return Stream(FromStore(store, HOOKS, device=CPU, n_ahead=2, **changes), CONFIG)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(make_lm, request):
    lm = make_lm()
    lm.model.to(request.param)
    return lm


def test_batches_are_those_of_the_stream_to_the_bit(model, tmp_path):
    store = written(model, tmp_path / "store")
    assert store.complete and len(store.shards) > 2 and store.verify() == []
    assert store.n_rows() == from_model(model).n_rows()
    wanted, got = list(streams(model, HOOKS, TEXTS, CONFIG)), list(stored(store))
    assert len(wanted) == len(got) > 50
    for a, b in zip(wanted, got, strict=True):
        assert a.keys() == b.keys()
        assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    assert stored(store).n_batches() == len(got)


def test_it_goes_on_from_any_place(lm, tmp_path, monkeypatch):
    from sae_persona.activations import store as module

    monkeypatch.setattr(module, "READ_BYTES", 16 * 4 * 2 * 50)  # several blocks a shard
    made = stored(written(lm, tmp_path / "store"))
    whole = list(made)
    for done in (0, 1, 13, len(whole)):
        first = iter(made)
        for _ in range(done):
            next(first)
        rest = list(made.resume(first.snapshot()))
        assert all(torch.equal(a["layers.1.resid_post"], b["layers.1.resid_post"])
                   for a, b in zip(rest, whole[done:], strict=True))  # fmt: skip


def test_a_killed_writer_goes_on_after_its_last_shard(lm, tmp_path):
    whole = written(lm, tmp_path / "whole")

    class Killed(Exception):
        pass

    def on_rows(n):
        seen.append(n)
        if sum(seen) > 700:
            raise Killed

    seen = []
    writer = Writer(tmp_path / "store", facts(lm), shard_rows=300)
    with pytest.raises(Killed):
        writer.write(from_model(lm).chunks(Place()), on_rows)
    (tmp_path / "store" / ".shard-00009.h5.1234.tmp").write_bytes(b"what a kill leaves")
    begun = Store(tmp_path / "store")
    assert not begun.complete and 0 < len(begun.shards) < len(whole.shards)
    with pytest.raises(DataError, match="is not complete: `sae-persona cache ... --resume` goes on"):
        stored(begun)
    assert stored(begun, skip_bad=True).n_batches() < stored(whole).n_batches()
    with pytest.raises(RunError, match="was begun with other settings: dtype was float32, now float16"):
        Writer(tmp_path / "store", facts(lm, dtype="float16"), shard_rows=300, resume=True)
    again = Writer(tmp_path / "store", facts(lm), shard_rows=300, resume=True)
    done = again.write(from_model(lm).chunks(again.place))
    assert done.complete and done.shards == whole.shards


@pytest.mark.parametrize("size", [50, 300, 10_000])
def test_a_writer_killed_before_the_last_word_adds_nothing(lm, tmp_path, size):
    whole = written(lm, tmp_path / "store", shard_rows=size)
    path = tmp_path / "store" / "store.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    again = Writer(tmp_path / "store", facts(lm), shard_rows=size, resume=True)
    done = again.write(from_model(lm).chunks(again.place))
    assert done.complete and done.shards == whole.shards


def test_a_truncated_shard_is_named_and_skipped_only_when_asked(lm, tmp_path):
    store = written(lm, tmp_path / "store")
    bad = tmp_path / "store" / store.shards[1].name
    bad.write_bytes(bad.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"shard-00001.h5 has \d+ bytes of \d+: .* --skip-bad"):
        stored(store)
    assert len(store.verify()) == 1 and "shard-00001.h5" in store.verify()[0]
    source = FromStore(store, HOOKS, device=CPU, n_ahead=0, skip_bad=True)
    assert source.skipped == [bad.name] and source.n_rows() == store.n_rows() - store.shards[1].rows
    assert len(list(Stream(source, CONFIG))) > 10
    bad.unlink()
    with pytest.raises(FormatError, match=r"shard-00001.h5 is missing"):
        stored(store)


def test_a_flipped_bit_is_found_by_verify(lm, tmp_path):
    store = written(lm, tmp_path / "store")
    with h5py.File(tmp_path / "store" / store.shards[2].name, "r+") as file:
        data = file["layers.1.resid_post"]
        data[5, 3] = data[5, 3] + 1
    (found,) = store.verify()
    assert "shard-00002.h5: the activations at layers.1.resid_post are not those that were written" in found


READ = """
import sys
from sae_persona.activations.store import Store
store = Store(sys.argv[1])
blocks = (rows["layers.1.resid_post"] for shard in store.shards for rows in store.rows(shard, store.hooks))
print(sum(float(rows.double().sum()) for rows in blocks))
"""


def test_many_processes_read_it_at_once(lm, tmp_path):
    written(lm, tmp_path / "store")
    command = [sys.executable, "-c", READ, str(tmp_path / "store")]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [reader.communicate(timeout=120)[0] for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    assert found[0] and len(set(found)) == 1


def test_what_is_no_store_is_refused(lm, tmp_path):
    with pytest.raises(RunError, match="no activation store at"):
        Store(tmp_path / "absent")
    with pytest.raises(FormatError, match="is no activation store, it has no store.json"):
        Store(tmp_path)
    store = written(lm, tmp_path / "store")
    with pytest.raises(RunError, match="is there already: choose another --out, or pass --resume"):
        Writer(tmp_path / "store", facts(lm), shard_rows=300)
    with pytest.raises(DataError, match=r"has no activations at layers.2.resid_post: it has layers.1.resid_post, "):
        FromStore(store, [HookPoint(2)], device=CPU, n_ahead=0)
    record = json.loads((tmp_path / "store" / "store.json").read_text())
    (tmp_path / "store" / "store.json").write_text(json.dumps({**record, "format": 7}))
    with pytest.raises(FormatError, match="has store format 7, this version reads 1"):
        Store(tmp_path / "store")


def test_a_full_disk_leaves_the_shards_before(lm, tmp_path, monkeypatch):
    from sae_persona import runs

    rename, calls = Path.replace, []

    def full(self, target):
        calls.append(target)
        if Path(target).name == "shard-00002.h5":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(runs.Path, "replace", full)
    with pytest.raises(RunError, match=r"cannot write .*shard-00002.h5: No space left on device"):
        written(lm, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert len(store.shards) == 2 and store.verify() == []
    assert not list((tmp_path / "store").glob(".*tmp"))


@pytest.mark.parametrize("size", [7, 100, 10_000])
def test_shards_are_of_one_size_but_the_last(lm, tmp_path, size):
    store = written(lm, tmp_path / "store", shard_rows=size)
    chunks = [len(next(iter(chunk.rows.values()))) for chunk in from_model(lm).chunks(Place())]
    full, rest = divmod(sum(chunks), size)
    assert [shard.rows for shard in store.shards] == [size] * full + [rest] * (rest > 0)
    assert store.shards[-1].bytes < 2 * 4 * 16 * max(rest, 1) + 8000 or not rest  # and no longer than they need
