"""Training that is broken off and goes on ends with the bits that it would have had."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from sae_persona.errors import ConfigError, FormatError, RunError
from sae_persona.sae.checkpoints import Checkpoints, Interrupted
from sae_persona.sae.kernel_plan import KernelConfig
from sae_persona.sae.recipe import TrainConfig
from sae_persona.sae.train import Job, train, train_many

CONFIG = TrainConfig(n_latents=64, k=4, steps=40, log_every=3, dead_after=500, lr=1e-3)
CASES = {
    "batch_topk": CONFIG,
    "topk": replace(CONFIG, rule="topk", clip=1.0),
    "jumprelu": replace(CONFIG, rule="jumprelu", prefixes=(16, 64)),
}


def batches(n=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, 16, generator=generator) + 5 for _ in range(n)]


class Killed(Exception):
    """As good as a kill: nothing is written on the way out."""


def kill_at(step):
    def on_step(line):
        if line["step"] == step:
            raise Killed

    return on_step


def checkpoints(folder, **facts):
    return Checkpoints(folder, minutes=0, facts=facts)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_a_killed_run_goes_on_to_the_same_bits(config, tmp_path):
    unbroken = train(batches(), config, progress=False, out=tmp_path / "unbroken.jsonl")
    for step in (12, 30):
        with pytest.raises(Killed):
            train(
                batches(), config, progress=False, checkpoints=checkpoints(tmp_path / "c"),
                out=tmp_path / "metrics.jsonl", on_step=kill_at(step),
            )  # fmt: skip
    sae = train(
        batches(), config, progress=False, checkpoints=checkpoints(tmp_path / "c"), out=tmp_path / "metrics.jsonl"
    )
    assert sae.fingerprint == unbroken.fingerprint and sae.metadata == unbroken.metadata

    def lines(name):
        found = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return [{**line, "tokens_per_s": None} for line in found]

    assert lines("metrics.jsonl") == lines("unbroken.jsonl")


def test_several_saes_are_each_as_if_trained_alone_also_when_broken_off(tmp_path):
    rows = [{"a": x, "b": 2 * x.flip(1)} for x in batches()]
    jobs = {
        "one": Job(config=CONFIG, source="a"),
        "two": Job(config=replace(CONFIG, k=8, n_latents=32), source="a"),
        "three": Job(config=CASES["jumprelu"], source="b"),
    }
    alone = {name: train([row[job.source] for row in rows], job.config, progress=False) for name, job in jobs.items()}
    with pytest.raises(Killed):
        broken = {**jobs, "two": replace(jobs["two"], on_step=kill_at(21))}
        train_many(rows, broken, progress=False, checkpoints=checkpoints(tmp_path))
    together = train_many(rows, jobs, progress=False, checkpoints=checkpoints(tmp_path))
    assert {n: s.fingerprint for n, s in together.items()} == {n: s.fingerprint for n, s in alone.items()}


def test_saes_that_are_trained_together_take_as_many_steps():
    jobs = {"one": Job(config=CONFIG), "two": Job(config=replace(CONFIG, steps=10))}
    with pytest.raises(ConfigError, match=r"the same number of steps, got \['10', '40'\]"):
        train_many(batches(), jobs, progress=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_ends_training(number, tmp_path):
    unbroken = train(batches(), CONFIG, progress=False)

    def on_step(line):
        if line["step"] == 15:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    rare = Checkpoints(tmp_path, minutes=60, facts={})
    with pytest.raises(Interrupted, match=f"{number.name} after step 15: its checkpoint is .*000015") as stopped:
        train(batches(), CONFIG, progress=False, checkpoints=rare, on_step=on_step)
    assert stopped.value.signal == number and signal.getsignal(number) == before
    assert train(batches(), CONFIG, progress=False, checkpoints=rare).fingerprint == unbroken.fingerprint


def test_a_signal_in_the_first_steps_waits_for_a_checkpoint(tmp_path):
    def on_step(line):
        os.kill(os.getpid(), signal.SIGTERM)

    config = replace(CONFIG, log_every=2)
    with pytest.raises(KeyboardInterrupt):  # the second one is not put off
        train(batches(), config, progress=False, checkpoints=checkpoints(tmp_path), on_step=on_step)


def test_only_the_last_checkpoint_is_kept(tmp_path):
    train(batches(), replace(CONFIG, steps=12), progress=False, checkpoints=checkpoints(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000012"]


def test_a_finished_run_is_finished_again_without_a_step(tmp_path):
    first = train(batches(), CONFIG, progress=False, checkpoints=checkpoints(tmp_path))
    again = train(batches(), CONFIG, progress=False, checkpoints=checkpoints(tmp_path), on_step=kill_at(40))
    assert again.fingerprint == first.fingerprint


def break_off(folder, **facts):
    with pytest.raises(Killed):
        train(batches(), CONFIG, progress=False, checkpoints=checkpoints(folder, **facts), on_step=kill_at(12))


def test_other_settings_are_named(tmp_path):
    break_off(tmp_path, training={"k": 4, "lr": 0.1}, texts="abc")
    with pytest.raises(RunError, match=r"other settings: training.k was 4, now 8; more was None, now \[1\]. Give"):
        train(
            batches(), CONFIG, progress=False,
            checkpoints=checkpoints(tmp_path, training={"k": 8, "lr": 0.1}, texts="abc", more=(1,)),
        )  # fmt: skip


def test_another_version_and_broken_files_are_refused(tmp_path):
    break_off(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = tmp_path.with_name("whole")
    shutil.copytree(path, whole)
    record = path / "rank-0-of-1" / "checkpoint.json"
    record.write_text(record.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(FormatError, match="has checkpoint format 99, this version reads 1"):
        break_off(tmp_path)
    shutil.copy(whole / "rank-0-of-1" / "checkpoint.json", record)
    record.write_text('{"format": 1}')
    with pytest.raises(FormatError, match="is not a checkpoint's record: start the run again"):
        break_off(tmp_path)
    shutil.copy(whole / "rank-0-of-1" / "checkpoint.json", record)
    part = path / "rank-0-of-1" / "sae-0.safetensors"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(FormatError, match="step-000000011/rank-0-of-1 is broken"):
        break_off(tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    from sae_persona.sae import checkpoints as module

    unbroken, save, calls = train(batches(), CONFIG, progress=False), module.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 9:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(RunError, match="cannot write .*step-.*No space left on device"):
        train(batches(), CONFIG, progress=False, checkpoints=checkpoints(tmp_path))
    (left,) = tmp_path.iterdir()
    assert left.name == "step-000000011"
    monkeypatch.setattr(module, "save_file", save)
    sae = train(batches(), CONFIG, progress=False, checkpoints=checkpoints(tmp_path))
    assert sae.fingerprint == unbroken.fingerprint


def test_batches_that_have_become_fewer_are_an_error(tmp_path):
    from sae_persona.errors import DataError

    break_off(tmp_path)
    with pytest.raises(DataError, match="training left off after 4 batches, now there are 3"):
        train(batches(3), CONFIG, progress=False, checkpoints=checkpoints(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("rule", ["topk", "batch_topk", "jumprelu"])
def test_a_killed_run_on_a_gpu_goes_on_to_the_same_bits(rule, tmp_path):
    generator = torch.Generator("cuda").manual_seed(0)
    data = [torch.randn(512, 128, generator=generator, device="cuda").bfloat16() for _ in range(30)]
    config = TrainConfig(n_latents=1024, k=8, steps=90, log_every=7, dead_after=4000, rule=rule, lr=1e-3)
    kernels = KernelConfig(spare=32.0, moments="bf16")
    unbroken = train(data, config, kernels=kernels, progress=False)
    for step in (21, 63):
        with pytest.raises(Killed):
            train(
                data, config, kernels=kernels, progress=False, checkpoints=checkpoints(tmp_path), on_step=kill_at(step)
            )
    sae = train(data, config, kernels=kernels, progress=False, checkpoints=checkpoints(tmp_path))
    assert sae.fingerprint == unbroken.fingerprint and sae.metadata == unbroken.metadata
