"""Train SAEs on any iterable of activation batches, one or several from the same batches."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from signal import Signals as Signal
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from sae_persona.errors import ConfigError, RunError
from sae_persona.runs import write_text
from sae_persona.sae.checkpoints import Checkpoints, Interrupted, Signals, signals_held
from sae_persona.sae.feed import ONLY, Batch, Feed
from sae_persona.sae.kernel_plan import DEFAULT_KERNELS, KernelConfig
from sae_persona.sae.model import SAE
from sae_persona.sae.recipe import TrainConfig
from sae_persona.sae.shard import ALONE, Shard
from sae_persona.sae.trainer import NotFinite, Trainer
from sae_persona.types import State

HEAD = 8  # batches that give the mean, the scale and the first thresholds
AGREE_EVERY = 16  # steps after which several ranks agree on whether a checkpoint is due: the host waits for the device

OnStep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One SAE of several that are trained together.

    config    how it is trained; ``steps`` is the same for all of them
    source    the name of its batches among those that come
    out       a metrics.jsonl, or None
    on_step   called with each line of metrics, or None
    """

    config: TrainConfig
    source: str = ONLY
    out: Path | None = None
    on_step: OnStep | None = None


class Diverged(RunError):
    """Training met a loss that is not finite.

    sae    what the last good step left, None if that is no use
    name   of the job
    """

    def __init__(self, message: str, sae: SAE | None, name: str = ONLY) -> None:
        super().__init__(message)
        self.sae, self.name = sae, name


def train(
    batches: Iterable[Tensor],
    config: TrainConfig,
    *,
    kernels: KernelConfig | None = DEFAULT_KERNELS,
    device: torch.device | None = None,
    out: Path | None = None,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
) -> SAE:
    """Train an SAE on batches [n, d_in] of activations, on ``device``, or where they are.

    On a CUDA device a step runs through the Triton kernels, as ``kernels`` says; None: in plain torch, as on a CPU.

    Training starts centred and scaled, and the SAE reads raw activations. With batch_topk it ends as a Threshold
    calibrated to k latents a token over batches after the last step, with jumprelu as the Threshold that was trained,
    from one calibrated over the first.

    Every ``log_every`` steps, and after the last, one line goes to ``out`` (a metrics.jsonl) and to ``on_step``: step,
    tokens, loss, auxk and with jumprelu sparsity (their shares of the loss), fvu, l0, dead (share), lr, tokens_per_s.
    ``progress`` draws a bar on stderr. The same batches and config give the same bits.

    With ``checkpoints`` one is written every so many minutes and on SIGINT or SIGTERM, which end training; where there
    is one, training goes on from it, and ends with the bits that it would have had (batches that cannot tell their
    place are gone through again).

    DataError: no batch, too few for ``steps``, another shape, NaN or infinity, all rows equal. Diverged: the loss is no
    longer finite, or activations on a GPU are not, where it is seen a line of metrics later; it carries the SAE of the
    last good step. RunError: ``out`` or a checkpoint cannot be written. Interrupted: by a signal.
    """
    job = Job(config=config, out=out, on_step=on_step)
    settings = {"kernels": kernels, "device": device, "checkpoints": checkpoints, "progress": progress}
    return train_many(batches, {ONLY: job}, **settings)[ONLY]


def train_many(
    batches: Iterable[Any],
    jobs: Mapping[str, Job],
    *,
    kernels: KernelConfig | None = DEFAULT_KERNELS,
    device: torch.device | None = None,
    shard: Shard = ALONE,
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
) -> dict[str, SAE]:
    """Train several SAEs on the same batches, each as `train` would alone: the same bits.

    batches   each a dict of tensors [n, d_in] by name (a hook point's, say); tensors, if all jobs read the same
    jobs      by name
    shard     one of several ranks, each of which calls this with batches of its own, as many and as long as others'. A
              step is on the batches of all ranks under each other. The SAEs are on the first rank; the others get
              none, need no ``out`` and are told nothing
    """
    steps = {job.config.steps for job in jobs.values()}
    if len(steps) != 1:
        raise ConfigError(
            f"SAEs that are trained together take the same number of steps, got {sorted(map(str, steps))}"
        )
    loop = _Loop(Feed(batches, steps.pop(), device), jobs, kernels, shard, checkpoints)
    if shard.rank:
        jobs = {name: replace(job, out=None, on_step=None) for name, job in jobs.items()}
    with ExitStack() as stack:
        meters = {name: stack.enter_context(_metered(job, loop.done)) for name, job in jobs.items()}
        total = loop.total
        bar = stack.enter_context(
            tqdm(
                total=total,
                initial=loop.done,
                unit="step",
                disable=not progress or shard.rank > 0,
                dynamic_ncols=True,
            )
        )
        loop.run(meters, bar)
    return loop.finished()


class _Loop:
    """Every SAE in training takes each batch in turn."""

    def __init__(
        self,
        feed: Feed,
        jobs: Mapping[str, Job],
        kernels: KernelConfig | None,
        shard: Shard,
        checkpoints: Checkpoints | None,
    ) -> None:
        self.feed, self.jobs, self.shard, self.checkpoints = feed, jobs, shard, checkpoints
        self.head: list[Batch] = []
        self.total = feed.steps or (len(feed.batches) if isinstance(feed.batches, Sized) else None)
        found = checkpoints.latest() if checkpoints else None
        self.trainers = self._started(kernels) if found is None else self._resumed(found, kernels)

    @property
    def done(self) -> int:
        """Steps that were taken before."""
        return next(iter(self.trainers.values())).steps

    def run(self, meters: Mapping[str, "_Meter"], bar: tqdm) -> None:
        """All steps that are left."""
        with signals_held() if self.checkpoints else nullcontext(Signals()) as held:
            for batch in chain(self.head, map(self._exchanged, self.feed)):
                for name, trainer in self.trainers.items():
                    with self._kept(name, trainer):
                        trainer.update(batch[self.jobs[name].source])
                        meters[name].after(trainer, bar)
                bar.update()
                self._checkpoint(held.received)
            for name, trainer in self.trainers.items():
                with self._kept(name, trainer):
                    meters[name].close(trainer, bar)
        if self.checkpoints is not None and self.done >= len(self.head):
            self._save()  # so that nothing is lost while the SAE is finished
        bar.total = bar.n  # 100 % whatever number of batches came
        bar.refresh()

    def finished(self) -> dict[str, SAE]:
        """The SAEs, on the first rank."""
        wanted = [job.config.calibration_tokens for job in self.jobs.values() if job.config.rule == "batch_topk"]
        beyond = self.feed.beyond(max(wanted, default=0) // self.shard.world)
        n = -self.shard.most(-len(beyond))  # as many as every rank has
        beyond = [self._exchanged(batch) for batch in beyond[:n]]
        found = {
            name: trainer.finish([batch[self.jobs[name].source] for batch in beyond])
            for name, trainer in self.trainers.items()
        }
        return {name: sae for name, sae in found.items() if sae is not None}

    def _exchanged(self, batch: Batch) -> Batch:
        """The batches of all ranks under each other."""
        if self.shard.world == 1:
            return batch
        return {name: self.shard.gather(x).flatten(0, 1) for name, x in batch.items()}

    @contextmanager
    def _kept(self, name: str, trainer: Trainer) -> Iterator[None]:
        """What is not finite in the block ends training with the SAE of the last good step."""
        try:
            yield
        except NotFinite as error:
            head = [batch[self.jobs[name].source] for batch in self.head]
            raise Diverged(str(error), trainer.last_good(head), name) from None

    def _checkpoint(self, signal: int | None) -> None:
        # before the first batches are used up, a run that starts again has lost next to nothing
        if self.checkpoints is None or self.done < len(self.head):
            return
        if self.shard.world > 1:
            if self.done % AGREE_EVERY:
                return
            signal = self.shard.most(signal or 0) or None
            due = self.shard.most(self.checkpoints.due)
        else:
            due = self.checkpoints.due
        if not (signal or due):
            return
        path = self._save()
        if signal:
            raise Interrupted(f"{Signal(signal).name} after step {self.done}: its checkpoint is {path}", signal)

    def _save(self) -> Path:
        assert self.checkpoints is not None, "there is a folder for checkpoints"
        parts = {"feed": self.feed.snapshot()}
        parts |= {f"sae-{i}": trainer.snapshot() for i, trainer in enumerate(self.trainers.values())}
        return self.checkpoints.save(self.done, parts)

    def _started(self, kernels: KernelConfig | None) -> dict[str, Trainer]:
        self.head = [self._exchanged(batch) for batch in islice(self.feed, HEAD)]
        return {
            name: Trainer.start(job.config, [batch[job.source] for batch in self.head], self.total, kernels, self.shard)
            for name, job in self.jobs.items()
        }

    def _resumed(self, ranks: Sequence[Mapping[str, State]], kernels: KernelConfig | None) -> dict[str, Trainer]:
        feeds = [parts["feed"] for parts in ranks]
        if len(ranks) == self.shard.world:
            self.feed.resume(feeds[self.shard.rank])
        else:
            self.feed.join(feeds, self.shard.rank, self.shard.world)
        device = self.feed.device or torch.device(feeds[0].numbers["device"])
        return {
            name: Trainer.resumed(
                job.config, [parts[f"sae-{i}"] for parts in ranks], self.total, kernels, device, self.shard
            )
            for i, (name, job) in enumerate(self.jobs.items())
        }


class _Meter:
    """Tells a file and the caller how one SAE's training goes, and the bar."""

    def __init__(self, job: Job, file: TextIO | None) -> None:
        self.job, self.file = job, file
        self.start, self.before = time.perf_counter(), -1
        self.told = 0

    def after(self, trainer: Trainer, bar: tqdm) -> None:
        """After a step: tell of it when it is its turn."""
        if self.before < 0:  # tokens of an earlier process are not counted in the rate
            self.before = trainer.tokens - len(trainer.tail[-1])
        if trainer.steps % self.job.config.log_every == 0:
            self._tell(trainer, bar)

    def close(self, trainer: Trainer, bar: tqdm) -> None:
        """Tell of the last step."""
        if trainer.steps > self.told and trainer.seen is not None:
            self._tell(trainer, bar)

    def _tell(self, trainer: Trainer, bar: tqdm) -> None:
        self.told = trainer.steps
        line = trainer.measures()
        rate = (trainer.tokens - self.before) / (time.perf_counter() - self.start)
        shown = {name: f"{line[name]:.3g}" for name in ("loss", "fvu", "l0", "dead")}
        bar.set_postfix({**shown, "tokens_per_s": f"{rate:.0f}"}, refresh=False)
        line["tokens_per_s"] = round(rate)
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.job.on_step is not None:
            self.job.on_step(line)


@contextmanager
def _metered(job: Job, done: int) -> Iterator[_Meter]:
    if job.out is None:
        yield _Meter(job, None)
        return
    try:
        job.out.parent.mkdir(parents=True, exist_ok=True)
        if done:
            write_text(job.out, _lines_until(job.out, done))
        file = job.out.open("a" if done else "w", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {job.out}: {error.strerror}. Choose another --out.") from error
    with file:
        yield _Meter(job, file)


def _lines_until(path: Path, step: int) -> str:
    """The lines of metrics up to a step, from which training goes on; a last line may be broken off."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return "".join(line for line in lines if _step_of(line) <= step)


def _step_of(line: str) -> float:
    """Infinite for what is no whole line of metrics."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
