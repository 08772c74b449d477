"""The commands that make SAEs and stores, as a user runs them."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from sae_persona import cli
from sae_persona.lab.corpora import write_texts
from sae_persona.runs import Run
from sae_persona.sae.formats import load_sae

FLAGS = [
    *("--hook", "layers.3", "--context-size", "128", "--tokens", "answers", "--buffer-tokens", "1024"),
    *("--batch-tokens", "128", "--n-latents", "64", "--k", "4", "--log-every", "5", "--lm-batch", "8", "--ahead", "1"),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder, n=120, n_labelled=8, n_questions=2, seed=0)
    return folder / "corpus.jsonl"


def command(*args):
    return [sys.executable, "-m", "sae_persona", *map(str, args)]


def run(*args):
    """The command in this process, which has torch imported already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sae-persona", *map(str, args)])
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def train(texts, out, *more):
    return ["train", "lab", texts, "--out", out, *FLAGS, "--steps", 60, *more]


@pytest.fixture(scope="module")
def unbroken(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run(*train(texts, out))
    assert done.returncode == 0, done.stderr
    return out


def test_progress_ends_at_100_percent_and_no_checkpoint_is_left(unbroken):
    assert (unbroken / "sae" / "cfg.json").is_file() and not (unbroken / "checkpoints").exists()
    assert len((unbroken / "metrics.jsonl").read_text().splitlines()) == 12


@pytest.mark.slow
def test_kill_9_at_a_random_step_and_resume_give_the_same_bits(texts, unbroken, tmp_path):
    out = tmp_path / "killed"
    flags = train(texts, out, "--checkpoint-minutes", 0)
    for more in ([], ["--resume"]):
        process = subprocess.Popen(command(*flags, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_step(out, random.randint(9, 20) + (20 if more else 0), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "sae").exists() and (out / "checkpoints").is_dir()
    done = run(*flags, "--resume")
    assert done.returncode == 0, done.stderr
    same_sae(out, unbroken)
    again = run(*flags, "--resume")
    assert again.returncode == 2 and "is trained to the end: there is nothing to resume" in again.stderr


def wait_for_step(out, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = [int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*")]
        if found and max(found) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint of step {step}: {process.poll()}")


def same_sae(a, b):
    assert load_sae(a / "sae").fingerprint == load_sae(b / "sae").fingerprint
    steps = [[json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (a, b)]
    assert steps[0] == steps[1]


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(texts, unbroken, tmp_path):
    out = tmp_path / "stopped"
    flags = train(texts, out)
    process = subprocess.Popen(command(*flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM after step" in said and "with --resume goes on" in said.splitlines()[-1]
    other = run(*train(texts, out, "--resume", "--lr", "0.5"))
    assert other.returncode == 2 and "made with other settings: training.lr was None, now 0.5" in other.stderr
    refused = run(*flags)
    assert refused.returncode == 2 and "is not empty" in refused.stderr
    done = run(*flags, "--resume")
    assert done.returncode == 0, done.stderr
    same_sae(out, unbroken)


def test_a_store_gives_the_very_sae_of_the_stream(texts, unbroken, tmp_path):
    store = tmp_path / "store"
    keys = FLAGS[:6]
    made = run("cache", "lab", texts, "--out", store, *keys, "--hook", "layers.1.resid_pre", "--lm-batch", 8,
               "--shard-tokens", 500)  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "activations at each of 2 hook points" in made.stdout
    assert "are as they were written" in run("cache", "verify", store).stdout
    done = run(*train(store, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    same_sae(tmp_path / "run", unbroken)
    shard = store / "shard-00001.h5"
    shard.write_bytes(shard.read_bytes()[:-50])
    found = run("cache", "verify", store, "--json")
    assert found.returncode == 1 and "shard-00001.h5" in json.loads(found.stdout)["wrong"][0]
    bad = run(*train(store, tmp_path / "bad"))
    assert bad.returncode == 2 and "shard-00001.h5 has" in bad.stderr and not (tmp_path / "bad").exists()
    assert run(*train(store, tmp_path / "bad", "--skip-bad")).returncode == 0


def test_wrong_requests_are_refused_in_one_line_before_anything_is_made(texts, tmp_path):
    for flags, message in [
        (["--dtype", "float8"], "dtype is one of float32, bfloat16, float16, got 'float8'"),
        (["--checkpoint-minutes", "-1"], "checkpoint_minutes must be 0 or more, got -1.0"),
        (["--context-size", "1000"], "context_size 1000 is more than lab takes"),
    ]:
        done = run(*train(texts, tmp_path / "run", *flags))
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()
    assert "no activation store at" in run("cache", "verify", tmp_path / "absent").stderr
    dry = run("cache", "lab", texts, "--out", tmp_path / "s", *FLAGS[:6], "--dry-run")
    assert dry.returncode == 0 and "GB a million" in dry.stdout and not (tmp_path / "s").exists()


def torchrun(n, *args):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command += ["-m", "sae_persona", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_train_one_sae_and_go_on_as_one_or_two_after_a_kill(texts, tmp_path):
    flags = train(texts, tmp_path / "whole", "--rule", "topk")
    whole = torchrun(2, *flags)
    out, said = whole.communicate(timeout=200)
    assert whole.returncode == 0, said
    assert "topk" in out and Run.open(tmp_path / "whole").stage("train")["ranks"] == 2
    sae = load_sae(tmp_path / "whole" / "sae")
    assert sae.n_latents == 64 and metrics(tmp_path / "whole")[-1]["fvu"] < 0.5

    flags = train(texts, tmp_path / "killed", "--rule", "topk", "--checkpoint-minutes", 0)
    process = torchrun(2, *flags)
    wait_for_step(tmp_path / "killed", 16, process)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=100)
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    again = torchrun(2, *flags, "--resume")
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0, said
    same_sae(tmp_path / "killed", tmp_path / "whole")

    flags[flags.index(tmp_path / "killed")] = tmp_path / "other"
    alone = run(*flags, "--resume")  # with another number of ranks
    assert alone.returncode == 0, alone.stderr
    ends = [metrics(tmp_path / name)[-1] for name in ("other", "whole")]
    assert ends[0]["step"] == ends[1]["step"] == 60
    assert ends[0]["fvu"] == pytest.approx(ends[1]["fvu"], rel=0.15)


def children(pid):
    return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_grid_is_trained_from_one_pass_and_compared(texts, tmp_path):
    held_out = texts.with_name("held_out.jsonl")
    shared = [flag for flag in FLAGS if flag not in ("--n-latents", "64", "--k", "4")]
    flags = ["grid", "lab", texts, "--out", tmp_path / "grid", *shared, "--hook", "layers.2", "--held-out", held_out]
    flags += ["--n-latents", "32,64", "--k", "2,4", "--steps", 40]
    done = run(*flags, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 8 and {row["hook"] for row in rows} == {"layers.3.resid_post", "layers.2.resid_post"}
    assert (tmp_path / "grid" / "pareto.html").is_file()
    by = {row["name"]: row for row in rows}
    assert by["layers.3.resid_post-64-k4"]["fvu"] < by["layers.3.resid_post-64-k2"]["fvu"]
    alone = run(*train(texts, tmp_path / "alone", "--steps", 40))
    assert alone.returncode == 0, alone.stderr
    same_sae(tmp_path / "alone", tmp_path / "grid" / "layers.3.resid_post-64-k4")
    again = run(*flags)
    assert again.returncode == 2 and "is not empty" in again.stderr
    dry = run(*flags[:3], "--out", tmp_path / "dry", *flags[5:], "--dry-run")
    assert dry.returncode == 0 and "8 SAEs at once" in dry.stdout and not (tmp_path / "dry").exists()


def test_a_tracker_that_is_not_installed_is_an_error_before_training(texts, tmp_path):
    done = run(*train(texts, tmp_path / "run", "--log", "trackio"))
    assert done.returncode == 2 and "--log trackio needs the package trackio" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hook", "layers.2"], "train is for one hook point, got 2: use grid"),
        (["--resume", "--force"], "--resume goes on with a run and --force replaces it: give one of them"),
        (["--sae-device", "foo"], "a device reads cpu, cuda or cuda:N, got 'foo'"),
        (["--sae-device", "cuda:7"], "CUDA devices here, no cuda:7: choose another, or cpu"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_requests_that_contradict_themselves(flags, message, texts, tmp_path):
    done = run(*train(texts, tmp_path / "run", *flags))
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and not (tmp_path / "run").exists()


def test_what_is_trained_stays_when_the_held_out_texts_fail_and_resume_measures_it(texts, tmp_path):
    bad = tmp_path / "bad.jsonl"
    good_lines = texts.with_name("held_out.jsonl").read_text().splitlines()[:20]
    bad.write_text("\n".join([*good_lines * 20, "not JSON"]) + "\n")  # so far on that nobody has looked before
    flags = train(texts, tmp_path / "run", "--steps", 12)
    done = run(*flags, "--held-out", bad)
    assert done.returncode == 2 and "is not JSON" in done.stderr
    assert (tmp_path / "run" / "sae").is_dir()
    bad.write_text("\n".join(good_lines) + "\n")
    again = run(*flags, "--held-out", bad, "--resume")
    assert again.returncode == 0 and "held-out: FVU" in again.stdout, again.stderr
    assert "nothing to resume" in run(*flags, "--held-out", bad, "--resume").stderr


def test_grid_and_cache_are_for_one_process(texts, tmp_path, monkeypatch):
    for command_line in (
        ["grid", "lab", texts, "--out", tmp_path / "o", *FLAGS[:6], "--held-out", texts],
        ["cache", "lab", texts, "--out", tmp_path / "o", *FLAGS[:6]],
    ):
        monkeypatch.setenv("WORLD_SIZE", "2")
        done = run(*command_line)
        assert done.returncode == 2 and "is for one process, torchrun has started 2" in done.stderr
        assert not (tmp_path / "o").exists()
