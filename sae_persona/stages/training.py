"""The stages that make SAEs and activation stores: texts through a model, into run folders."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sae_persona.activations.ahead import ahead
from sae_persona.activations.lm import LM, checked_device, load_lm
from sae_persona.activations.sequences import sequences
from sae_persona.activations.shuffle import Chunk
from sae_persona.activations.store import FromStore, Store, Writer
from sae_persona.activations.stream import FromModel, Stream, StreamConfig, layout_for, streams
from sae_persona.activations.texts import Texts, path_of, read_texts
from sae_persona.errors import ConfigError, DataError, ModelError, RunError
from sae_persona.runs import Run, file_hash, write_json
from sae_persona.sae.checkpoints import Checkpoints
from sae_persona.sae.formats import hook_metadata, load_sae, save_sae
from sae_persona.sae.kernel_plan import DEFAULT_KERNELS, KernelConfig, plan_step
from sae_persona.sae.model import SAE
from sae_persona.sae.quality import Quality, quality
from sae_persona.sae.recipe import TrainConfig
from sae_persona.sae.shard import ALONE, Shard
from sae_persona.sae.trackers import open_trackers
from sae_persona.sae.train import Diverged, Job, train_many
from sae_persona.types import HookPoint

Source = str | Path | Sequence[Any] | Texts
UNTOLD = {"ahead", "buffer_on_host", "log_every"}  # settings that change nothing of what comes out


@dataclass(frozen=True, kw_only=True)
class PlaceConfig:
    """Where training runs, and how it survives."""

    sae_device: str | None = None
    """Where the SAE trains: cpu, cuda or cuda:N. None: where the model is."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints, which a run goes on from with --resume. SIGINT and SIGTERM write one, too."""
    skip_bad: bool = False
    """Go without shards of an activation store that cannot be read, and take one that is not complete."""
    log: tuple[str, ...] = ()
    """Trackers that get the metrics, too: wandb (offline unless WANDB_MODE or WANDB_API_KEY say otherwise), trackio,
    tensorboard. metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        if not self.checkpoint_minutes >= 0:
            raise ConfigError(f"checkpoint_minutes must be 0 or more, got {self.checkpoint_minutes}")


DEFAULT_PLACE = PlaceConfig()


def open_model(run: Run, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LM:
    """The language model that the run was trained on. ModelError if what is there now has another config."""
    made = run.stage("train")["model"]
    lm = load_lm(made["name"], device=device, dtype=dtype, blocks=made["blocks"])
    if lm.config_hash != made["config_hash"]:
        raise ModelError(f"{made['name']} is not the model that {run.path} was made with: its config is another one")
    return lm


def open_sae(run: Run, lm: LM) -> SAE:
    """The run's SAE. ModelError if it is not for this model."""
    run.stage("train")
    sae = load_sae(run.sae)
    sae.check_width(lm.d_model)
    return sae.to(lm.device)


def input_facts(source: Source) -> dict[str, Any]:
    """What the manifest says of a stage's texts: a file's name and hash, or that they came from memory."""
    if isinstance(source, str | Path):
        path = path_of(source)
        whole = path / "store.json" if Store.is_at(path) else path  # a store's record has the sums of its shards
        return {"path": str(source), "sha256": file_hash(whole) if path.exists() else None}
    return {"path": None, "sha256": None}


def _model_facts(lm: LM) -> dict[str, Any]:
    """What a manifest says of the model."""
    model = {"name": lm.name, "config_hash": lm.config_hash, "blocks": lm.blocks_path}
    return {"model": model, "dtype": str(lm.dtype).removeprefix("torch.")}


def train_stage(
    run: Run,
    lm: LM,
    hook: HookPoint,
    texts: Source,
    *,
    streaming: StreamConfig,
    training: TrainConfig,
    kernels: KernelConfig | None = DEFAULT_KERNELS,
    place: PlaceConfig = DEFAULT_PLACE,
    held_out: Source | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    shard: Shard = ALONE,
    progress: bool = True,
) -> SAE | None:
    """Train an SAE on streamed activations; with ``held_out`` texts, measure its quality on them too.

    texts   what ``read_texts`` takes, or the folder of an activation store
    shard   one of several ranks: each reads its share of the texts, and the first alone writes, into a run that it has
            made; the others give the same ``run``, which need not be there yet, and get None

    Goes on from the run's checkpoint where there is one.
    """
    settings = {"streaming": streaming, "kernels": kernels, "place": place, "shard": shard, "progress": progress}
    trained = shard.total(shard.rank == 0 and run.has("train")) > 0
    if trained and (held_out is None or run.has("quality")):
        raise RunError(f"{run.path} is trained to the end: there is nothing to resume")
    if not trained:
        train_members(lm, texts, {"": Member(run, hook, training, on_step)}, checkpoints=run.checkpoints, **settings)
    if shard.rank:
        return None
    if held_out is not None:
        quality_stage(run, lm, held_out, streaming=streaming, progress=progress)
    return open_sae(run, lm)


@dataclass(frozen=True)
class Member:
    """One SAE of those that are trained in one pass of the model, and the run folder that it gets."""

    run: Run
    hook: HookPoint
    training: TrainConfig
    on_step: Callable[[dict[str, Any]], None] | None = None


def train_members(
    lm: LM,
    texts: Source,
    members: Mapping[str, Member],
    *,
    streaming: StreamConfig,
    kernels: KernelConfig | None,
    place: PlaceConfig,
    checkpoints: Path,
    shard: Shard = ALONE,
    progress: bool,
) -> None:
    """Train several SAEs, at one or several hook points, on one stream of activations; each into its run folder."""
    hooks = list(dict.fromkeys(member.hook for member in members.values()))
    if streaming.batch_tokens % shard.world:
        raise ConfigError(f"batch_tokens {streaming.batch_tokens} must be a multiple of the {shard.world} ranks")
    own = replace(streaming, batch_tokens=streaming.batch_tokens // shard.world)
    batches = open_stream(lm, hooks, texts, own, share=(shard.rank, shard.world), skip_bad=place.skip_bad)
    # the learning rate can only fall towards an end that is known
    known = {member.training.steps for member in members.values()}
    steps = known.pop() if len(known) == 1 else None
    steps = steps or -shard.most(-batches.n_batches())  # as many as every rank has
    jobs = {
        name: Job(
            config=replace(member.training, steps=steps),
            source=str(member.hook),
            out=member.run.metrics,
            on_step=member.on_step,
        )
        for name, member in members.items()
    }
    shared = {
        **_model_facts(lm),
        "streaming": asdict(streaming),
        "texts": input_facts(texts),
    }
    facts = _told(shared, jobs, kernels)
    kept = Checkpoints(checkpoints, minutes=place.checkpoint_minutes, facts=facts, shard=shard)
    settings = {
        "kernels": kernels,
        "device": _device(place) or lm.device,
        "shard": shard,
        "checkpoints": kept,
        "progress": progress,
    }
    if shard.rank:
        train_many(batches, jobs, **settings)
        return
    with ExitStack() as stack:
        for name, member in members.items():
            made = {"hook": str(member.hook), "training": asdict(member.training), "ranks": shard.world}
            stack.enter_context(member.run.recording("train", **shared, **made))
            jobs[name] = stack.enter_context(_tracked(jobs[name], place.log, member.run, made))
        saes = _trained(lm, batches, members, jobs, settings)
        for name, member in members.items():
            save_sae(saes[name], member.run.sae, metadata=hook_metadata(lm, member.hook))
    kept.clear()


@contextmanager
def _tracked(job: Job, names: Sequence[str], run: Run, config: dict[str, Any]) -> Iterator[Job]:
    """The job with its metrics going to trackers, too."""
    trackers = open_trackers(names, folder=run.path, name=run.path.name, config=config)

    def on_step(line: dict[str, Any]) -> None:
        for tracker in trackers:
            tracker.log(line)
        if job.on_step is not None:
            job.on_step(line)

    try:
        yield replace(job, on_step=on_step)
    finally:
        for tracker in trackers:
            tracker.close()


def _device(place: PlaceConfig) -> torch.device | None:
    return None if place.sae_device is None else checked_device(place.sae_device)


def _trained(
    lm: LM,
    batches: Stream,
    members: Mapping[str, Member],
    jobs: Mapping[str, Job],
    settings: dict[str, Any],
) -> dict[str, SAE]:
    try:
        return train_many(batches, jobs, **settings)
    except Diverged as error:
        member = members[error.name]
        raise RunError(f"{error}{_keep(error.sae, member.run, hook_metadata(lm, member.hook))}") from error


def grid_stage(
    folder: Path,
    lm: LM,
    hooks: Sequence[HookPoint],
    texts: Source,
    configs: Sequence[TrainConfig],
    *,
    streaming: StreamConfig,
    kernels: KernelConfig | None,
    place: PlaceConfig,
    held_out: Source,
    resume: bool = False,
    progress: bool = True,
) -> list[Run]:
    """Train an SAE of each config at each hook point, all from one pass of the model, and measure them on texts.

    Makes FOLDER/HOOK-n_latents-k for each. With ``resume`` goes on with a folder that was begun. RunError if there is
    something else.
    """
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is not empty: choose another --out, or pass --resume to go on with it")
    members: dict[str, Member] = {}
    for hook in hooks:
        for config in configs:
            name = f"{hook}-{config.n_latents}-k{config.k}"
            path = folder / name
            run = Run.open(path) if resume and path.exists() else Run.create(path)
            members[name] = Member(run, hook, config)
    left = {name: member for name, member in members.items() if not member.run.has("train")}
    if left:
        train_members(
            lm, texts, left, streaming=streaming, kernels=kernels, place=place,
            checkpoints=folder / "checkpoints", progress=progress,
        )  # fmt: skip
    for member in members.values():
        if not member.run.has("quality"):
            quality_stage(member.run, lm, held_out, streaming=streaming, progress=progress)
    return [member.run for member in members.values()]


def _told(shared: Mapping[str, Any], jobs: Mapping[str, Job], kernels: KernelConfig | None) -> dict[str, Any]:
    """What must be the same where a run goes on."""
    streaming = {name: value for name, value in shared["streaming"].items() if name not in UNTOLD}
    training = {}
    for name, job in jobs.items():
        config = {key: value for key, value in asdict(job.config).items() if key not in UNTOLD}
        training[name] = {**config, "hook": job.source}
    if set(training) == {""}:
        training = training[""]
    texts = shared["texts"]["sha256"] or shared["texts"]["path"]  # moved texts are the same texts
    return {
        **shared,
        "texts": texts,
        "streaming": streaming,
        "training": training,
        "kernels": kernels and asdict(kernels),
    }


def _keep(sae: SAE | None, run: Run, metadata: dict[str, str]) -> str:
    """Save the SAE of the last good step beside the run, which goes with its error; what to add to the message."""
    if sae is None:
        return ""
    path = run.path.with_name(f"{run.path.name}.last_good")
    save_sae(sae, path, metadata=metadata)
    return f". The SAE of the last good step is in {path}"


def quality_stage(run: Run, lm: LM, held_out: Source, *, streaming: StreamConfig, progress: bool = False) -> Quality:
    """Measure how well the SAE stands in for the activations on texts that it was not trained on."""
    with run.recording("quality", texts=input_facts(held_out)):
        sae = open_sae(run, lm)
        found = quality(
            lm,
            sae.hook,
            sae,
            held_out,
            context_size=streaming.context_size,
            lm_batch=streaming.lm_batch,
            tokens=streaming.tokens,
            progress=progress,
        )
        write_json(run.quality, asdict(found))
    return found


def open_stream(
    lm: LM,
    hooks: Sequence[HookPoint],
    texts: Source,
    streaming: StreamConfig,
    *,
    share: tuple[int, int] = (0, 1),
    skip_bad: bool = False,
) -> Stream:
    """Activations at the hook points: from the model, or from a store where ``texts`` is the folder of one.

    ModelError if the store was made with another model, ConfigError if it was with other settings.
    """
    if not (isinstance(texts, str | Path) and Store.is_at(texts)):
        return streams(lm, hooks, read_texts(texts).share(*share), streaming)
    store = Store(Path(texts))
    made = store.facts["model"]
    if made["config_hash"] != lm.config_hash:
        raise ModelError(f"{texts} was made with {made['name']}, which is not {lm.name}: its config is another one")
    for name in ("context_size", "tokens"):
        if store.facts[name] != getattr(streaming, name):
            raise ConfigError(
                f"{texts} has {name} {store.facts[name]}, wanted {getattr(streaming, name)}: pass "
                f"--{name.replace('_', '-')} {store.facts[name]}"
            )
    source = FromStore(store, hooks, device=lm.device, n_ahead=streaming.ahead, share=share, skip_bad=skip_bad)
    return Stream(source, streaming)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    shard_tokens: int = 262_144
    """Activations a shard, at each hook point: 2 GB at width 4096 in bf16. A killed writer loses at most one."""

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise ConfigError(f"shard_tokens must be at least 1, got {self.shard_tokens}")


DEFAULT_CACHE = CacheConfig()


def cache_stage(
    path: Path,
    lm: LM,
    hooks: Sequence[HookPoint],
    texts: Source,
    *,
    streaming: StreamConfig,
    config: CacheConfig = DEFAULT_CACHE,
    resume: bool = False,
    on_rows: Callable[[int], object] = lambda n: None,
) -> Store:
    """Write the activations of one round over the texts to a store; with ``resume`` go on with one that was begun."""
    source = streams(lm, hooks, texts, streaming).source
    assert isinstance(source, FromModel), "texts go through the model"
    layout = layout_for(lm, streaming)
    facts = {
        **_model_facts(lm),
        "hooks": [str(hook) for hook in hooks],
        "d_in": lm.d_model,
        "texts": input_facts(texts),
        "context_size": streaming.context_size,
        "tokens": streaming.tokens,
        "lm_batch": streaming.lm_batch,  # what shares a pass decides the last bits
        "pack": layout.pack,
    }
    writer = Writer(path, facts, shard_rows=config.shard_tokens, resume=resume)
    # the model runs on while a chunk is written
    return writer.write(ahead(source.chunks(writer.place), 1, _on_host), on_rows)


def _on_host(chunk: Chunk) -> Chunk:
    return chunk._replace(rows={name: rows.cpu() for name, rows in chunk.rows.items()})


def check_texts(lm: LM, source: Source, streaming: StreamConfig, *, store: bool = False) -> None:
    """DataError unless at least one of the texts has a token to read: before anything is made for nothing.

    store   an activation store will do, too
    """
    if isinstance(source, str | Path) and Store.is_at(source):
        if not store:
            raise DataError(f"{source} is an activation store, these texts go through the model: give the texts")
        return
    if next(sequences(lm, read_texts(source), streaming.context_size, streaming.tokens), None) is None:
        wanted = "a token" if streaming.tokens == "all" else "an answer: --tokens answers needs dialogues"
        raise DataError(f"none of the texts in {source} has {wanted}")


def plan(
    lm: LM, hook: HookPoint, streaming: StreamConfig, training: TrainConfig, kernels: KernelConfig | None = None
) -> str:
    """What training would do and hold, in tokens and megabytes; on a GPU, with ``kernels``, also how long it takes."""
    steps = "one pass over the texts" if training.steps is None else f"{training.steps} steps"
    lines = [
        f"{training.rule} SAE of {training.n_latents} latents, k {training.k}, width {lm.d_model}, at {hook}",
        f"{steps} of {streaming.batch_tokens} activations; learning rate {training.peak_lr:.2e}",
        f"shuffle buffer {streaming.buffer_tokens * lm.d_model * lm.dtype.itemsize / 1e6:.1f} MB",
    ]
    if kernels is not None:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "H200"
        step = plan_step(
            kernels,
            n=streaming.batch_tokens,
            d_in=lm.d_model,
            n_latents=training.n_latents,
            k=training.k,
            rule=training.rule,
            n_prefixes=max(1, len(training.prefixes)),
            card=card,
        )
        return "\n".join([*lines, f"on {card}:", str(step)])
    parameters = 2 * training.n_latents * lm.d_model + training.n_latents + lm.d_model
    pre_acts = streaming.batch_tokens * training.n_latents * 4
    lines += [
        f"parameters {parameters:,}: {parameters * 16 / 1e6:.1f} MB with gradients and Adam's moments in fp32",
        f"pre-activations of a batch {pre_acts / 1e6:.1f} MB",
    ]
    return "\n".join(lines)
