"""Emergent misalignment in the planted lab: made, diffed, tracked, foreseen, undone.

    python experiments/2026-11-emergent-misalignment/run.py OUT [--config FILE] [--processes N] [--parts A,B]

    OUT/lm-0/organisms/           fine-tunes of every seed, with checkpoints and the judge's rates
    OUT/lm-0/seed-1/sae-HOOK/     a run folder for each hook point
    OUT/lm-0/seed-1/*.json        what the studies found with that seed's SAE

lm-0 is the shipped model; another seed is pretrained first, into OUT/lm-N/model (ten minutes on one core). What is
there is not made again, so the script can be stopped at any time and started once more. Jobs run in processes of one
thread. Parts: organisms, saes, watch, undo, each of which needs those before it.
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
from undoing import certify, couple, guard, heal
from watching import compare, follow, leave_out

from sae_persona.errors import ConfigError
from sae_persona.lab.build import build
from sae_persona.lab.pretrain import PretrainConfig
from sae_persona.studies.families import plans
from sae_persona.studies.growing import grow_all
from sae_persona.studies.organisms import Organism

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


@dataclass(frozen=True)
class Place:
    """Where one language model is, and everything that is made of it."""

    folder: Path
    model: str
    settings: Settings

    @property
    def organisms(self) -> Path:
        return self.folder / "organisms"

    def seed(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}"

    def sae(self, seed: int, hook: str) -> Path:
        return self.seed(seed) / f"sae-{hook}"

    @property
    def watched(self) -> str:
        """The hook point whose latents are watched."""
        return self.settings.saes.hooks[0]


def organisms(places: Sequence[Place], processes: int) -> None:
    for at in places:
        grow_all(
            at.organisms,
            at.settings.organisms,
            model=at.model,
            processes=processes,
            on_organism=lambda one, left: print(f"{one.name}  {left} left", flush=True),
        )


def saes(places: Sequence[Place], processes: int) -> None:
    do([job for at in places for seed in at.settings.sae_seeds for job in sae_jobs(at, seed)], processes)


def watch(places: Sequence[Place], processes: int) -> None:
    each = [(at, seed) for at in places for seed in at.settings.sae_seeds]
    do([compare_job(at, seed) for at, seed in each], processes)
    do([job for at, seed in each for job in watch_jobs(at, seed)], processes)


def undo(places: Sequence[Place], processes: int) -> None:
    do([job for at in places for seed in at.settings.sae_seeds for job in undo_jobs(at, seed)], processes)


PARTS: dict[str, Callable[[Sequence[Place], int], None]] = {
    "organisms": organisms,
    "saes": saes,
    "watch": watch,
    "undo": undo,
}


def sae_jobs(at: Place, seed: int) -> list[Job]:
    return [
        Job(f"SAE {hook}, seed {seed}", path / "latents.h5", sae_run, (path, at.model, hook, seed, at.settings.saes))
        for hook in at.settings.saes.hooks
        for path in [at.sae(seed, hook)]
    ]


def compare_job(at: Place, seed: int) -> Job:
    out, sae = at.seed(seed), at.sae(seed, at.watched)
    arguments = (out, at.organisms, sae, at.model, seed, at.settings)
    return Job(f"panel, seed {seed}", out / "panel.json", compare, arguments)


def watch_jobs(at: Place, seed: int) -> list[Job]:
    out, sae = at.seed(seed), at.sae(seed, at.watched)
    return [
        Job(f"track, seed {seed}", None, follow, (out, at.organisms, at.model, at.settings)),
        Job(f"unseen, seed {seed}", out / "unseen.json", leave_out, (out, at.organisms, sae, at.model, at.settings)),
    ]


def undo_jobs(at: Place, seed: int) -> list[Job]:
    out, settings = at.seed(seed), at.settings
    runs = [at.sae(seed, hook) for hook in settings.saes.hooks]
    made = [
        Organism.load(at.organisms / plan.name)
        for plan in plans(settings.organisms)
        if (plan.method, plan.seed) == ("full", seed) and plan.family in settings.undo.families
    ]
    first = at.organisms / f"narrow-{settings.organisms.domains[0]}-full-s{seed}"
    watched = at.sae(seed, at.watched)
    jobs = {
        "reversals": [
            Job(f"reversal of {one.name}", path, certify, (out, one.path, runs, at.model, settings))
            for one in made
            for path in [out / f"reversal-{one.name}.json"]
        ],
        "prevent": [
            Job(f"prevent, seed {seed}", out / "prevent.json", guard, (out, first, watched, at.model, settings))
        ],
        "realign": [Job(f"realign, seed {seed}", out / "realign.json", heal, (out, first, at.model, settings))],
        "coupling": [Job(f"coupling, seed {seed}", out / "coupling.json", couple, (out, watched, at.model, settings))],
    }
    return [job for study in settings.undo.studies for job in jobs[study]]


def run(out: Path, settings: Settings, parts: Sequence[str], processes: int, lm_seeds: Sequence[int]) -> None:
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"parts are {', '.join(PARTS)}, got {unknown[0]!r}")
    folders = {seed: out / f"lm-{seed}" for seed in lm_seeds}
    do(
        [
            Job(f"model {seed}", folder / "model", lab_model, (folder / "model", seed))
            for seed, folder in folders.items()
            if seed
        ],
        processes,
    )
    places = [Place(folder, str(folder / "model") if seed else "lab", settings) for seed, folder in folders.items()]
    for part in PARTS:
        if part in parts:
            PARTS[part](places, processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, default=HERE / "full.toml")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lm-seeds", default="0", help="seeds of language models, with commas; 0 is the shipped one")
    parser.add_argument("--parts", default=",".join(PARTS), help="what is done, with commas")
    given = parser.parse_args()
    seeds = [int(part) for part in given.lm_seeds.split(",")]
    run(given.out, read_settings(given.config), given.parts.split(","), given.processes, seeds)


if __name__ == "__main__":
    main()
