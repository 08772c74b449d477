"""AuxK on a GPU: the dead latents gathered, and dense products over them alone. Formulas: `auxk_loss` in `loss.py`.

How many latents are dead is read by the host a few steps late, so that it never waits; by then the device knows better,
and takes the set of the moment, as far as the room made for it goes.
"""

from dataclasses import dataclass

import torch
from sae_kernels.auxk import MAX_DEAD, keep_auxk, prune_auxk, row_dots, scaled_rows
from sae_kernels.values import AuxGrads, Rows
from torch import Tensor

from sae_persona.sae.shard import ALONE, Shard

EVERY = 16  # steps between two readings of the number of dead latents
ROOM = 128  # the room for them is a multiple of it


class LateNumber:
    """A number on the device that the host reads ``EVERY`` steps after it was written."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._host = torch.zeros(1, pin_memory=self._cuda)
        self._written: torch.cuda.Event | None = None

    def write(self, number: Tensor) -> None:
        """Start to copy it; before the next call, `read`."""
        self._host.copy_(number.reshape(1), non_blocking=True)
        if self._cuda:
            self._written = torch.cuda.Event()
            self._written.record()

    def read(self) -> float:
        """What was written last; 0 before. Steps ago, so there is nothing to wait for."""
        if self._written is not None:
            self._written.synchronize()
        return float(self._host)


@dataclass(frozen=True)
class DeadSet:
    """Some dead latents: idx [m] int32, n_latents where fewer are dead; each latent's place or -1.

    n_dead   []   how many they are, on all ranks
    """

    idx: Tensor
    n_dead: Tensor
    slot: Tensor


def room_for(n_dead: int, n_latents: int, ranks: int = 1) -> int:
    """Places to make for ``n_dead`` latents of a rank and the few that may die until it is read again."""
    if n_dead == 0:
        return 0
    wanted = -(-(n_dead + n_dead // 64) // ROOM) * ROOM
    return min(wanted, MAX_DEAD // ranks, -(-n_latents // ROOM) * ROOM)


def dead_set(silent: Tensor, dead_after: int, room: int, turn: int) -> DeadSet:
    """The latents silent for ``dead_after`` tokens, at most ``room`` of them: then others at another ``turn``."""
    n_latents = len(silent)
    dead = silent >= dead_after
    first = turn * room % n_latents
    found = torch.nonzero_static(dead.roll(-first), size=room, fill_value=-1).flatten()
    idx = torch.where(found < 0, n_latents, (found + first) % n_latents)
    slot = torch.full((n_latents + 1,), -1, dtype=torch.int32, device=silent.device)
    slot[idx] = torch.arange(room, dtype=torch.int32, device=silent.device)
    slot[n_latents:].fill_(-1)  # not = -1, which would copy from the host, and cannot be captured in a graph
    return DeadSet(idx.int(), dead.sum().int().clamp(max=room), slot[:n_latents])


@dataclass(frozen=True)
class AuxKept:
    """What AuxK found on the first tokens of a batch: the activations of the dead, kept [n_aux, m]."""

    dead: DeadSet
    kept: Tensor
    shard: Shard = ALONE

    def gradients(self, error: Tensor, z: Tensor, decoder: Rows) -> tuple[AuxGrads, AuxGrads, Tensor]:
        """Gradients of the encoder and the decoder rows, before AUX; and what is left of the error, [n_aux, d].

        error   [n, d]   reconstruction - x of the whole dictionary
        z       [n, d]   what the encoder read
        """
        assert decoder.inverse_norm is not None, "a decoder's rows have norms"
        n = len(self.kept)
        w_dec = scaled_rows(decoder.high, decoder.inverse_norm, self.dead.idx)
        left = self._left(error[:n], w_dec)
        d_kept = torch.ops.aten.threshold_backward(left @ w_dec.T, self.kept, 0)
        d_dec, d_enc = self.kept.T @ left, d_kept.T @ z[:n]
        along = row_dots(d_dec, w_dec)
        d_b = d_kept.sum(dim=0, dtype=torch.float32)
        return AuxGrads(d_enc, self.dead.slot, d_b), AuxGrads(d_dec, self.dead.slot, along), left

    def _left(self, error: Tensor, w_dec: Tensor) -> Tensor:
        if self.shard.world == 1:
            return torch.addmm(error, self.kept, w_dec)
        rebuilt = self.shard.sum((self.kept @ w_dec).float())
        return rebuilt.add_(error).to(error.dtype)


def agree(kept: Tensor, k_aux: int, shard: Shard) -> None:
    """Leave of what the ranks keep [n_aux, m] the ``k_aux`` largest of each token."""
    if shard.world > 1 and k_aux < shard.world * kept.shape[1]:
        prune_auxk(shard.gather(kept), k_aux, shard.rank, kept=kept)


def keep(pre: Tensor, dead: DeadSet, n_latents: int, k_aux: int, kept: Tensor) -> None:
    """Fill ``kept`` for the tokens of a slice."""
    keep_auxk(pre, dead.idx, n_latents, k_aux, kept=kept)
