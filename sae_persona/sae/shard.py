"""A dictionary in blocks over ranks, and the few words that ranks exchange in a training step.

Each rank holds a contiguous block of the latents: its rows of encoder and decoder, biases, thresholds, moments and
counters. All ranks see the same batch; b_dec is on all of them, and the same to the bit, since everything that its
gradient is made of has been summed over the ranks first. `torchrun` starts the ranks; `joined` makes them one group.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sae_persona.errors import ConfigError, RunError

PATIENCE = timedelta(minutes=5)  # in which every rank has to come to a collective: a step takes seconds


@dataclass(frozen=True)
class Shard:
    """One rank among those that share a dictionary. Alone, every collective is the identity.

    RunError from any collective that another rank does not come to: on a CPU at once when it has died, else after the
    group's timeout. On GPUs NCCL's own watchdog may end the process before.

    group   None: the default group
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    def bounds(self, n_latents: int, rank: int | None = None) -> tuple[int, int]:
        """First latent of a rank's block (None: of this one) and the one behind its last.

        Sizes differ by at most one, larger ones first. The kernels pad blocks themselves, so any size will do.
        """
        rank = self.rank if rank is None else rank
        size, rest = divmod(n_latents, self.world)
        first = rank * size + min(rank, rest)
        return first, first + size + (rank < rest)

    def block(self, rows: Tensor) -> Tensor:
        """This rank's part of rows [n_latents, ...]: a view."""
        first, stop = self.bounds(len(rows))
        return rows[first:stop]

    def placed(self, n_rows: int) -> tuple[int, int]:
        """First latent of this rank's ``n_rows``, and the latents of all ranks. ConfigError if that is no block."""
        n_latents = self.total(n_rows)
        first, stop = self.bounds(n_latents)
        if stop - first != n_rows:
            wanted = f"rank {self.rank} of {self.world} must hold latents {first} to {stop - 1} of {n_latents}"
            raise ConfigError(f"{wanted}, got {n_rows} rows: give each rank shard.block(rows)")
        return first, n_latents

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place, the same to the bit on all of them."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """The largest over ranks, in place."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def before(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks before this one."""
        return self.gather(x)[: self.rank].sum(dim=0, dtype=x.dtype)

    def total(self, number: int) -> int:
        """The sum of a number over ranks. The host waits."""
        return number if self.world == 1 else int(self.sum(torch.tensor(number, device=self._device)))

    def most(self, number: int) -> int:
        """The largest of a number over ranks. The host waits."""
        return number if self.world == 1 else int(self.max(torch.tensor(number, device=self._device)))

    def summed(self, x: Tensor) -> Tensor:
        """The sum over ranks, for a loss that every rank computes of it: each gets the gradient of its own part."""
        return x if self.world == 1 else _Summed.apply(x, self)  # pyright: ignore[reportReturnType]

    def gather(self, x: Tensor) -> Tensor:
        """What every rank has in place of x, of one shape on all: [world, ...]."""
        if self.world == 1:
            return x[None]
        found = x.new_empty(self.world, *x.shape)
        with _or_lost():
            dist.all_gather(list(found.unbind(0)), x.contiguous(), group=self.group)
        return found

    def among_largest(self, values: Tensor, k: int, *, width: int) -> Tensor:
        """Which of the values [rows, m <= width] are among the k largest of all ranks' in their row: bool.

        Of equal ones those on the lowest rank, and there the first. Alone, of equal ones any.
        """
        m = values.shape[1]
        if self.world == 1:
            chosen = torch.zeros_like(values, dtype=torch.bool)
            return chosen.scatter_(1, values.topk(min(k, m), dim=1, sorted=False).indices, True)
        everyone = self.gather(torch.nn.functional.pad(values, (0, width - m), value=-torch.inf))
        everyone = everyone.transpose(0, 1).flatten(1)  # in each row one rank after the other
        level = everyone.topk(min(k, self.world * width), dim=1).values[:, -1:]
        above, equal = everyone > level, everyone == level
        room = k - above.sum(dim=1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(dim=1) <= room))
        return chosen[:, self.rank * width : self.rank * width + m]

    def to_first(self, rows: Tensor, n_latents: int) -> Tensor | None:
        """All ranks' rows [n_latents, ...] on rank 0, in the memory of the CPU; None on the others."""
        if self.rank:
            with _or_lost():
                dist.send(rows.contiguous(), group=self.group, group_dst=0)
            return None
        blocks = [rows.detach().cpu()]
        for rank in range(1, self.world):
            first, stop = self.bounds(n_latents, rank)
            block = rows.new_empty(stop - first, *rows.shape[1:])
            with _or_lost():
                dist.recv(block, group=self.group, group_src=rank)
            blocks.append(block.cpu())
        return torch.cat(blocks)

    def _reduced(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world > 1:
            with _or_lost():
                dist.all_reduce(x, op, group=self.group)
        return x

    @property
    def _device(self) -> str:
        return "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"


ALONE = Shard()


@contextmanager
def joined(device: str, *, timeout: timedelta = PATIENCE) -> Iterator[Shard]:
    """The group of the processes that torchrun started, for as long as the block; without torchrun, `ALONE`.

    device    cuda: NCCL, and this rank's GPU becomes the current one; else gloo
    timeout   after which a rank that does not come is lost
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _or_lost():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    yield Shard(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error, since it would wait for ranks that are lost


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shard: Shard) -> Tensor:
        return shard.sum(x.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@contextmanager
def _or_lost() -> Iterator[None]:
    """RunError in place of what torch.distributed raises when a rank does not answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).strip().partition("\n")[0]
        raise RunError(f"a rank was lost: resume from the last checkpoint ({why})") from error
