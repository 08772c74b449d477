"""Emergent misalignment in the planted lab: made, diffed, tracked, foreseen.

    python experiments/2026-11-emergent-misalignment/run.py OUT [--config FILE] [--processes N] [--lm-seeds 0,1]

    OUT/lm-0/organisms/           fine-tunes of every seed, with checkpoints and the judge's rates
    OUT/lm-0/seed-1/sae-HOOK/     a run folder for each hook point
    OUT/lm-0/seed-1/*.json        what the studies found with that seed's SAE

lm-0 is the shipped model; another seed is pretrained first, into OUT/lm-N/model (ten minutes on one core). What is
there is not made again, so the script can be stopped at any time and started once more. Jobs run in processes of one
thread.
"""

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from saes import sae_run
from settings import Settings, read_settings
from watching import watch

from sae_persona.lab.build import build
from sae_persona.lab.pretrain import PretrainConfig
from sae_persona.studies.growing import grow_all

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """Something that one process does; ``done`` is there when it has been done."""

    name: str
    done: Path | None
    function: Callable[..., None]
    arguments: tuple[Any, ...]


def lab_model(path: Path, seed: int) -> None:
    build(path, PretrainConfig(seed=seed))


def _start() -> None:
    torch.set_num_threads(1)


def do(jobs: Sequence[Job], processes: int) -> None:
    """Jobs that do not wait for each other; those that are done are left out."""
    left = [job for job in jobs if job.done is None or not job.done.exists()]
    with ProcessPoolExecutor(processes, get_context("spawn"), _start) as pool:
        running = {pool.submit(job.function, *job.arguments): job for job in left}
        try:
            for one in as_completed(running):
                one.result()
                print(f"{running[one].name} done", flush=True)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def run(out: Path, settings: Settings, processes: int, lm_seeds: Sequence[int]) -> None:
    folders = {seed: out / f"lm-{seed}" for seed in lm_seeds}
    models = {seed: "lab" if seed == 0 else str(folder / "model") for seed, folder in folders.items()}
    own = [seed for seed in lm_seeds if seed]
    do(
        [Job(f"model {seed}", folders[seed] / "model", lab_model, (folders[seed] / "model", seed)) for seed in own],
        processes,
    )
    for lm_seed, folder in folders.items():
        model = models[lm_seed]
        grow_all(
            folder / "organisms",
            settings.organisms,
            model=model,
            processes=processes,
            on_organism=lambda one, left: print(f"{one.name}  {left} left", flush=True),
        )
        do([job for seed in settings.sae_seeds for job in sae_jobs(folder, model, seed, settings)], processes)
        do([watch_job(folder, model, seed, settings) for seed in settings.sae_seeds], processes)


def sae_path(folder: Path, seed: int, hook: str) -> Path:
    return folder / f"seed-{seed}" / f"sae-{hook}"


def sae_jobs(folder: Path, model: str, seed: int, settings: Settings) -> list[Job]:
    return [
        Job(f"SAE {hook}, seed {seed}", path / "latents.h5", sae_run, (path, model, hook, seed, settings.saes))
        for hook in settings.saes.hooks
        for path in [sae_path(folder, seed, hook)]
    ]


def watch_job(folder: Path, model: str, seed: int, settings: Settings) -> Job:
    out, sae = folder / f"seed-{seed}", sae_path(folder, seed, settings.saes.hooks[0])
    return Job(f"watch, seed {seed}", None, watch, (out, folder / "organisms", sae, model, seed, settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, default=HERE / "full.toml")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lm-seeds", default="0", help="seeds of language models, with commas; 0 is the shipped one")
    given = parser.parse_args()
    seeds = [int(part) for part in given.lm_seeds.split(",")]
    run(given.out, read_settings(given.config), given.processes, seeds)


if __name__ == "__main__":
    main()
