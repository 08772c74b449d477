"""Commands that make SAEs and activation stores: `train`, `grid`, `cache`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from sae_persona.activations.lm import LM, checked_device, load_lm
from sae_persona.activations.store import DTYPES, Store
from sae_persona.activations.stream import StreamConfig
from sae_persona.commands.flags import counts, with_flags
from sae_persona.commands.options import AsJson, Device, DryRun, Force, Texts, say, show_result, with_default
from sae_persona.errors import ConfigError
from sae_persona.report.pareto import point_of, rows, write_pareto
from sae_persona.report.text import describe
from sae_persona.runs import Run
from sae_persona.sae.kernel_plan import KernelConfig
from sae_persona.sae.recipe import TrainConfig
from sae_persona.sae.shard import joined
from sae_persona.sae.trackers import check_tracker
from sae_persona.stages import training as stages
from sae_persona.stages.training import CacheConfig, PlaceConfig
from sae_persona.types import HookPoint

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder in Hugging Face layout, hub id, or lab.")]
TextsArgument = Annotated[
    Path, typer.Argument(metavar="TEXTS", help=f"What the model reads: {Texts}; or an activation store.")
]
Hook = "layers.LAYER.resid_post or resid_pre, layers from 0"
HeldOut = Annotated[Path | None, typer.Option(help="Texts to measure the SAE's quality on.")]
Blocks = Annotated[str | None, typer.Option(help="Module path of the model's list of blocks.")]
Dtype = Annotated[str, typer.Option(help="The model's: float32, bfloat16 or float16.")]
Compile = Annotated[bool, typer.Option(help="Compile the model's blocks: minutes at first, faster afterwards.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run at --out, from its last checkpoint.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(train)
    app.command()(grid)
    app.add_typer(cache_app, name="cache")


def _load(model: str, device: str, dtype: str, blocks: str | None, *, compiled: bool = False) -> LM:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    lm = load_lm(model, device=device, dtype=DTYPES[dtype], blocks=blocks)
    if compiled:
        lm.compile()
    return lm


def _check_rule(kernels: KernelConfig, training: TrainConfig) -> None:
    if kernels.precision == "fp8" and training.rule != "topk":
        raise ConfigError(f"precision fp8 is for rule topk, got {training.rule}: choose bf16, or --rule topk")


def _check_place(place: PlaceConfig) -> None:
    """An error for a tracker whose package or a device that is not there, before anything is loaded."""
    for name in place.log:
        check_tracker(name)
    if place.sae_device is not None:
        checked_device(place.sae_device)


def _check_alone(command: str) -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise ConfigError(f"{command} is for one process, torchrun has started {world}: start it alone")


def _as_stored(texts: Path, streaming: StreamConfig) -> StreamConfig:
    """As the store was made, if ``texts`` is one: what is in it was cut then."""
    if not Store.is_at(texts):
        return streaming
    facts = Store(texts).facts
    say(f"activations from {texts}: context size {facts['context_size']}, tokens {facts['tokens']}")
    return replace(streaming, context_size=facts["context_size"], tokens=facts["tokens"])


@with_flags(streaming=StreamConfig, training=TrainConfig, kernels=KernelConfig, place=PlaceConfig)
def train(
    model: Model,
    texts: TextsArgument,
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    hook: Annotated[list[str], typer.Option(help=f"Hook point: {Hook}.")],
    streaming: StreamConfig,
    training: TrainConfig,
    kernels: KernelConfig,
    place: PlaceConfig,
    held_out: HeldOut = None,
    blocks: Blocks = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    compile: Compile = False,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Train an SAE on the streamed activations of a model at one hook point."""
    _check_rule(kernels, training)
    _check_place(place)
    if len(hook) > 1:
        raise ConfigError(f"train is for one hook point, got {len(hook)}: use grid")
    if resume and force:
        raise ConfigError("--resume goes on with a run and --force replaces it: give one of them")
    with joined(device) as shard:
        # a rank has the GPU of its number
        device = f"cuda:{torch.cuda.current_device()}" if shard.world > 1 and device.startswith("cuda") else device
        # what a GPU would take can be asked for where there is none
        lm = _load(model, "cpu" if dry_run else device, dtype, blocks, compiled=compile)
        point = HookPoint.parse(hook[0])
        lm.check(point)
        streaming = _as_stored(texts, streaming)
        stages.check_texts(lm, texts, streaming, store=True)
        if held_out is not None:
            stages.check_texts(lm, held_out, streaming)
        if dry_run:
            on_gpu = device.startswith("cuda")
            typer.echo(stages.plan(lm, point, streaming, training, kernels if on_gpu else None))
            return
        settings = {"streaming": streaming, "training": training, "kernels": kernels, "place": place, "shard": shard}
        if shard.rank:
            shard.total(1)  # the first rank has made the folder
            stages.train_stage(Run(out), lm, point, texts, held_out=held_out, **settings)
            return
        if resume and not (out / "checkpoints").is_dir() and not (out / "sae").is_dir():
            say(f"no checkpoint in {out}: from the first step on")
        with Run.making(out, force=force, resume=resume) as run:
            shard.total(1)
            stages.train_stage(run, lm, point, texts, held_out=held_out, **settings)
        typer.echo(describe(run))


@with_flags(
    skip={"training": {"n_latents", "k", "k_start"}},
    streaming=StreamConfig, training=TrainConfig, kernels=KernelConfig, place=PlaceConfig,
)  # fmt: skip
def grid(
    model: Model,
    texts: TextsArgument,
    out: Annotated[Path, typer.Option(help="Folder to make, with a run folder for each SAE.")],
    hook: Annotated[list[str], typer.Option(help=f"Hook point: {Hook}. May be given several times.")],
    held_out: Annotated[Path, typer.Option(help="Texts that the SAEs are compared on.")],
    streaming: StreamConfig,
    training: TrainConfig,
    kernels: KernelConfig,
    place: PlaceConfig,
    n_latents: Annotated[str, typer.Option(metavar="A,B,...", help="Widths.")] = "4096",
    k: Annotated[str, typer.Option(metavar="A,B,...", help="Latents kept per token.")] = "16,32,64",
    blocks: Blocks = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    compile: Compile = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train an SAE for each hook point, width and k from one pass of the model, and draw L0 against what it costs."""
    _check_rule(kernels, training)
    _check_place(place)
    _check_alone("grid")
    lm = _load(model, "cpu" if dry_run else device, dtype, blocks, compiled=compile)
    points = list(dict.fromkeys(HookPoint.parse(text) for text in hook))
    for point in points:
        lm.check(point)
    streaming = _as_stored(texts, streaming)
    stages.check_texts(lm, texts, streaming, store=True)
    stages.check_texts(lm, held_out, streaming)
    configs = [replace(training, n_latents=n, k=each) for n in counts(n_latents) for each in counts(k)]
    if dry_run:
        on_gpu = kernels if device.startswith("cuda") else None
        plans = [stages.plan(lm, point, streaming, config, on_gpu) for point in points for config in configs]
        typer.echo("\n\n".join([*plans, f"{len(plans)} SAEs at once, from one pass of the model"]))
        return
    runs = stages.grid_stage(
        out, lm, points, texts, configs, streaming=streaming, kernels=kernels, place=place, held_out=held_out,
        resume=resume,
    )  # fmt: skip
    found = [point_of(run) for run in runs]
    page = write_pareto(found, out / "pareto.html")
    lines = [f"{p.name:40} L0 {p.l0:7.2f}  FVU {p.fvu:.4f}  dead {p.dead:.2f}" for p in found]
    show_result("\n".join([*lines, str(page)]), rows(found), as_json)


cache_app = typer.Typer(
    cls=with_default("make"),
    no_args_is_help=True,
    help="Keep activations on disk, for many trainings: `cache MODEL TEXTS --out STORE`, `cache verify STORE`.",
)


@cache_app.command(name="make")
@with_flags(
    skip={"streaming": {"batch_tokens", "buffer_tokens", "buffer_on_host", "passes", "hold_tokens", "seed"}},
    streaming=StreamConfig,
    config=CacheConfig,
)
def cache_make(
    model: Model,
    texts: TextsArgument,
    out: Annotated[Path, typer.Option(help="Store to make.")],
    hook: Annotated[list[str], typer.Option(help=f"Hook point: {Hook}. May be given several times.")],
    streaming: StreamConfig,
    config: CacheConfig,
    blocks: Blocks = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    compile: Compile = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the store at --out.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Write the activations of a model on texts, in their order, as HDF5 shards."""
    if Store.is_at(texts):
        raise ConfigError(f"{texts} is an activation store already: give the texts")
    _check_alone("cache")
    lm = _load(model, "cpu" if dry_run else device, dtype, blocks, compiled=compile)
    hooks = list(dict.fromkeys(HookPoint.parse(text) for text in hook))
    for point in hooks:
        lm.check(point)
    stages.check_texts(lm, texts, streaming)
    if dry_run:
        row = lm.d_model * DTYPES[dtype].itemsize * len(hooks)
        typer.echo(
            f"activations of {', '.join(map(str, hooks))}, {row / 1e3:.1f} kB a token, {row * 1e-3:.1f} GB a million; "
            f"shards of {config.shard_tokens} tokens, {config.shard_tokens * row / 1e6:.1f} MB"
        )
        return
    with tqdm(unit="token", unit_scale=True, dynamic_ncols=True) as bar:
        store = stages.cache_stage(
            out, lm, hooks, texts, streaming=streaming, config=config, resume=resume, on_rows=bar.update
        )
    typer.echo(f"{store.path}: {store.n_rows()} activations at each of {len(hooks)} hook points, "
               f"{sum(shard.bytes for shard in store.shards) / 1e6:.1f} MB in {len(store.shards)} shards")  # fmt: skip


@cache_app.command(name="verify")
def cache_verify(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="An activation store.")], as_json: AsJson = False
) -> None:
    """Read a store whole and compare it with the sums that were written; exit status 1 if anything is wrong."""
    opened = Store(store)
    wrong = opened.verify()
    if not opened.complete:
        wrong.append(f"{store} is not complete: `sae-persona cache ... --resume` goes on")
    facts = {"rows": opened.n_rows(), "shards": len(opened.shards), "complete": opened.complete, "wrong": wrong}
    good = f"{store}: {opened.n_rows()} activations in {len(opened.shards)} shards are as they were written"
    show_result("\n".join(wrong) or good, facts, as_json)
    if wrong:
        raise typer.Exit(1)
