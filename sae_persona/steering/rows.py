"""The edits of one hook point as rows of one table: what is read, the line it goes through, where it moves the stream.

    f = e . x + b, 0 where that is not above theta          target = min(max(slope * f + shift, low), high)
    x' = x + sum over the rows that are on of (target - f) d

A latent is such a row under a rule with a threshold; a direction is one with e = d, b = 0 and no threshold. Under TopK
a latent's activation depends on all others, so the full encoder is read there, and the rest is the same.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from sae_kernels import ops
from torch import Tensor

from sae_persona.errors import ConfigError
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Threshold, TopK
from sae_persona.steering.directions import check_wide
from sae_persona.steering.interventions import LatentEdit, Pin, Placed
from sae_persona.steering.positions import Spans

CORRELATED = 0.5
"""Edits of directions with a cosine of this or more are warned of: each undoes or doubles a part of the other."""


class EditsMeet(UserWarning):
    """Two edits pull on correlated directions."""


@dataclass(eq=False)
class Rows:
    """m rows, made from the edits of one hook point; `owner` says which edit each belongs to.

    enc, dec          [m, d_in] fp32
    bias, threshold   [m] fp32, threshold -inf for directions
    line              [m, 4] fp32: slope, shift, low, high
    owner             [m] int64
    latent            [m] int64, -1 for directions
    """

    edits: tuple[Placed, ...]
    enc: Tensor
    dec: Tensor
    bias: Tensor
    threshold: Tensor
    line: Tensor
    owner: Tensor
    latent: Tensor
    full: SAE | None = None
    """The SAE whose whole encoder must be read."""
    of_full: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Rows that it reads, those of latents."""
    pins: Tensor | None = None
    """Rows that are pinned: [p] int64."""
    _solve: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        edits: Sequence[Placed],
        sae: SAE | None,
        d_in: int,
        device: torch.device | str = "cpu",
        *,
        requests: Sequence[int] | None = None,
    ) -> "Rows":
        """Make the table; ``requests`` says which request each edit is of, those of different ones never meet.

        ConfigError for latents that do not exist, edits that collide and what a rule cannot do.
        """
        asked = list(zip(edits, requests or [0] * len(edits), strict=True))
        _check(asked, sae)
        parts = [_of_edit(one, sae, d_in) for one in edits]
        enc, dec, bias, threshold, latent = (torch.cat([part[i] for part in parts]) for i in range(5))
        counts = torch.tensor([len(part[0]) for part in parts])
        owner = torch.arange(len(edits)).repeat_interleave(counts)
        line = torch.tensor([one.edit.line for one in edits])[owner]
        is_full = sae is not None and isinstance(sae.rule, TopK) and bool((latent >= 0).any())
        pinned = torch.tensor([isinstance(one.edit, Pin) for one in edits])[owner]
        rows = cls(
            tuple(edits), *(x.to(device) for x in (enc, dec, bias, threshold, line, owner, latent)),
            full=sae if is_full else None, of_full=(latent >= 0).nonzero().flatten().to(device),
            pins=pinned.nonzero().flatten().to(device) if pinned.any() else None,
        )  # fmt: skip
        rows._prepare_pins()
        _warn_of_correlated(rows, [r for _, r in asked])
        return rows

    @property
    def encoder(self) -> str:
        """ "full" where all latents must be encoded, else "partial": only the rows in hand are read."""
        return "partial" if self.full is None else "full"

    def read(self, x: Tensor) -> Tensor:
        """What the rows read of x [n, d_in]: [n, m] fp32, latents that do not fire as 0."""
        if self.full is None:
            pre = torch.nn.functional.linear(x.float(), self.enc, self.bias)
            return pre.where(pre > self.threshold, 0.0)
        acts = torch.nn.functional.linear(x.float(), self.enc)  # directions; latents are overwritten
        return acts.index_copy(1, self.of_full, self.full.latents_at(x.float(), self.latent[self.of_full]))

    def moved(self, x: Tensor, on: Tensor | None = None) -> Tensor:
        """x [n, d_in] with the edits of the rows that are ``on`` [n, m] bool (None: all), in the dtype of x.

        Arithmetic is in fp32. Tokens at which nothing changes come out bit for bit. No host waits for a GPU, but under
        TopK.
        """
        if on is None:
            on = torch.ones(len(x), len(self.owner), dtype=torch.bool, device=x.device)
        if self.full is None and self.pins is None:
            return ops.edit_rows(x, on, self.enc, self.bias, self.threshold, self.dec, self.line)
        delta = self.deltas(x, on)
        moved = (x.float() + delta @ self.dec).to(x.dtype)
        return moved.where((delta != 0).any(dim=-1, keepdim=True), x)

    def deltas(self, x: Tensor, on: Tensor) -> Tensor:
        """By how much each row changes what it reads of x [n, d_in]: [n, m] fp32."""
        acts = self.read(x)
        slope, shift, low, high = self.line.unbind(dim=1)
        delta = ((slope * acts + shift).clamp(low, high) - acts).where(on, 0.0)
        if self.pins is None:
            return delta
        assert self._solve is not None
        pre = torch.nn.functional.linear(x.float(), self.enc[self.pins], self.bias[self.pins])
        others = delta.index_fill(1, self.pins, 0.0)
        lacking = shift[self.pins] - pre - others @ (self.dec @ self.enc[self.pins].T)
        return others.index_copy(1, self.pins, (lacking @ self._solve) * on[:, self.pins])

    def _prepare_pins(self) -> None:
        """The inverse of G, G_ij = e_i . d_j over the pins, transposed: moves are what is lacking times it."""
        if self.pins is None:
            return
        g = (self.enc[self.pins].double() @ self.dec[self.pins].double().T).cpu()
        if not torch.linalg.cond(g) < 1e6:
            latents = ", ".join(str(int(i)) for i in self.latent[self.pins])
            raise ConfigError(
                f"no move pins latents {latents} at once: what their encoder reads of their decoder directions is "
                f"singular (condition {torch.linalg.cond(g):.1e}): pin fewer, or clamp"
            )
        self._solve = torch.linalg.inv(g).T.float().to(self.enc.device)


def _of_edit(one: Placed, sae: SAE | None, d_in: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of one edit: enc, dec [m, d_in], bias, threshold, latent [m]; on the CPU."""
    if not isinstance(one.edit, LatentEdit):
        basis = one.edit.basis.cpu()
        check_wide(basis, d_in)
        m = len(basis)
        return basis, basis, torch.zeros(m), torch.full((m,), -math.inf), torch.full((m,), -1)
    assert sae is not None
    latent = torch.tensor([one.edit.latent], device=sae.b_dec.device)
    rows = sae.rows(latent)
    return rows.enc.cpu(), rows.dec.cpu(), rows.bias.cpu(), rows.threshold.cpu(), latent.cpu()


def _check(asked: Sequence[tuple[Placed, int]], sae: SAE | None) -> None:
    latents = [(one.edit.latent, one, r) for one, r in asked if isinstance(one.edit, LatentEdit)]
    if not latents:
        return
    if sae is None:
        raise ConfigError(f"an edit of latent {latents[0][0]} needs the SAE of its hook point, got none")
    sae.check_rebuilds()
    if unknown := [i for i, _, _ in latents if not 0 <= i < sae.n_latents]:
        raise ConfigError(f"latent {unknown[0]} does not exist: this SAE has latents 0 to {sae.n_latents - 1}")
    check_collisions(latents)
    pins = [(one.edit, one, r) for _, one, r in latents if isinstance(one.edit, Pin)]
    _check_pins(pins, sae)
    if shared := [pin.latent for pin, _, _ in pins if sum(i == pin.latent for i, _, _ in latents) > 1]:
        raise ConfigError(f"latent {shared[0]} is pinned, which is solved with all pins on: give it no other edit")


def check_collisions(latents: Sequence[tuple[int, Placed, int]]) -> None:
    """ConfigError where two edits of one latent, by (latent, edit, request), would act at one token and none wins."""
    for (i, a, q), (j, b, r) in combinations(latents, 2):
        if (i, q) == (j, r) and a.priority == b.priority and not _apart(a, b):
            raise ConfigError(
                f"latent {i} is edited twice at the same tokens: give one edit a latent, other positions, or priorities"
            )


def _check_pins(pins: Sequence[tuple[Pin, Placed, int]], sae: SAE) -> None:
    for pin, one, request in pins:
        if not isinstance(sae.rule, Threshold | ReLU):
            name = type(sae.rule).__name__
            raise ConfigError(f"latent {pin.latent} cannot be pinned: under {name} it depends on the others")
        least = float(sae.rows(torch.tensor([pin.latent], device=sae.b_dec.device)).threshold)
        if pin.value <= least:
            raise ConfigError(f"latent {pin.latent} fires above {least:g}, so it cannot be pinned to {pin.value:g}")
        _, first, its_request = pins[0]
        if one.positions != first.positions or one.when is not first.when or request != its_request:
            raise ConfigError(
                "pins of one hook point are solved together: give them one request, the same positions and condition"
            )


APART = {("pre", "generated"), ("prompt", "generated")}


def _apart(a: Placed, b: Placed) -> bool:
    """Whether two edits never meet at a token."""
    if isinstance(a.positions, Spans) and isinstance(b.positions, Spans):
        return all(p[1] <= q[0] or q[1] <= p[0] for p in a.positions.spans for q in b.positions.spans)
    return (a.positions, b.positions) in APART or (b.positions, a.positions) in APART


def _warn_of_correlated(rows: Rows, requests: Sequence[int]) -> None:
    unit = torch.nn.functional.normalize(rows.dec.double(), dim=1)
    cosines, owner, latent = (unit @ unit.T).tolist(), rows.owner.tolist(), rows.latent.tolist()
    for i, j in combinations(range(len(cosines)), 2):
        same = owner[i] == owner[j] or latent[i] == latent[j] >= 0
        if same or requests[owner[i]] != requests[owner[j]] or abs(cosines[i][j]) < CORRELATED:
            continue
        names = [f"latent {x}" if x >= 0 else "a direction" for x in (latent[i], latent[j])]
        warnings.warn(
            f"edits of {names[0]} and {names[1]} pull on directions with cosine {cosines[i][j]:+.2f}: each reads the "
            "unedited stream, so together they move it further along both than either was asked to",
            EditsMeet,
            stacklevel=2,
        )


def wins(edits: Sequence[Placed], on: Tensor) -> Tensor:
    """``on`` [..., edits] without the edits of a latent that meet one of more priority."""
    for i, j in combinations(range(len(edits)), 2):
        a, b = edits[i], edits[j]
        if isinstance(a.edit, LatentEdit) and isinstance(b.edit, LatentEdit) and a.edit.latent == b.edit.latent:
            loser, winner = (i, j) if a.priority < b.priority else (j, i)
            if a.priority != b.priority:
                on = on.clone()
                on[..., loser] &= ~on[..., winner]
    return on
