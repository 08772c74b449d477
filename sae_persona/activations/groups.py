"""Sequences put together for forward passes: on the CPU, so that a thread can do it beside the model.

pieces     aaaa bb ccc d eeeee
rows       eeeee           packed: several a row, each seeing only itself
           aaaa d
           ccc bb
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_persona.activations.dialogues import Tokens
from sae_persona.activations.lm import LM
from sae_persona.activations.sequences import Place, Which, id_tensor, kept, placed
from sae_persona.activations.texts import Texts

FORWARDS = 8  # as many forward passes are filled from one group


@dataclass(frozen=True, eq=False)
class Forward:
    """One pass of the model over b rows of t positions.

    input_ids, position   [b, t] int64, position counted from the start of each sequence
    segment               [b, t] int64, the sequence's number in its row, -1 on padding
    packed                some row holds more than one sequence
    bounds                [s + 1] int32, the first of the b * t positions of each sequence and of each run of padding
    source, target        [m] int64, which of the b * t positions are kept, and which rows of the group they are
    """

    input_ids: Tensor
    position: Tensor
    segment: Tensor
    packed: bool
    bounds: Tensor
    source: Tensor
    target: Tensor

    def pinned(self) -> "Forward":
        """In memory from which a GPU reads without making the host wait."""
        moved = {name: x.pin_memory() for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Group:
    """Sequences in the order of the texts; their kept tokens are rows 0 to n.

    start, end   places of the first sequence, and after the last
    places       of each sequence
    bounds       first row of each sequence, and n
    """

    start: Place
    end: Place
    places: list[Place]
    sequences: list[Tokens]
    bounds: list[int]
    forwards: list[Forward]

    @property
    def n(self) -> int:
        return self.bounds[-1]


@dataclass(frozen=True)
class Layout:
    """How sequences are put together: at most ``context_size`` tokens a row, ``lm_batch`` rows a forward pass."""

    context_size: int
    lm_batch: int
    which: Which
    pack: bool


def groups(lm: LM, texts: Texts, layout: Layout, start: Place) -> Iterator[Group]:
    """The groups of one round over the texts, from the start of one of them. The same texts give the same groups."""
    room = FORWARDS * layout.lm_batch * (layout.context_size if layout.pack else 1)
    found: list[tuple[Place, Tokens]] = []
    filled = 0
    for place, tokens in placed(lm, texts, layout.context_size, layout.which, start):
        if layout.pack and filled + len(tokens.ids) > room:
            yield _group(lm, found, layout)
            found, filled = [], 0
        found.append((place, tokens))
        filled += len(tokens.ids) if layout.pack else 1
        if filled == room:
            yield _group(lm, found, layout)
            found, filled = [], 0
    if found:
        yield _group(lm, found, layout)


def _group(lm: LM, found: Sequence[tuple[Place, Tokens]], layout: Layout) -> Group:
    sequences = [tokens for _, tokens in found]
    wanted = [kept(lm, tokens, layout.which) for tokens in sequences]
    bounds = [0]
    for one in wanted:
        bounds.append(bounds[-1] + int(one.sum()))
    lengths = [len(tokens.ids) for tokens in sequences]
    # rows of like length share a pass, and short ones come first, as they always have
    rows = packed_rows(lengths, layout.context_size) if layout.pack else [[i] for i in range(len(lengths))]
    rows.sort(key=lambda row: sum(lengths[i] for i in row))
    forwards = [
        _forward(lm, rows[at : at + layout.lm_batch], sequences, wanted, bounds)
        for at in range(0, len(rows), layout.lm_batch)
    ]
    last = found[-1][0]
    places = [place for place, _ in found]
    return Group(places[0], last._replace(piece=last.piece + 1), places, sequences, bounds, forwards)


def packed_rows(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which sequences share a row of ``size`` tokens: the longest first, each where it leaves the least room."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # room left, row; sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(open_rows, (lengths[i], -1))
        if at == len(open_rows):
            left, row = size, len(rows)
            rows.append([])
        else:
            left, row = open_rows.pop(at)
        rows[row].append(i)
        if left > lengths[i]:
            insort(open_rows, (left - lengths[i], row))
    return rows


def _forward(
    lm: LM, rows: list[list[int]], sequences: list[Tokens], wanted: list[Tensor], bounds: list[int]
) -> Forward:
    width = max(1, max(sum(len(sequences[i].ids) for i in row) for row in rows))  # no model runs on no positions
    input_ids = torch.full((len(rows), width), lm.pad_id)
    position, segment = torch.zeros_like(input_ids), torch.full_like(input_ids, -1)
    source, target, firsts = [], [], []
    for r, row in enumerate(rows):
        at = 0
        for s, i in enumerate(row):
            ids = sequences[i].ids
            firsts.append(r * width + at)
            span = slice(at, at + len(ids))
            input_ids[r, span] = id_tensor(sequences[i])
            position[r, span] = torch.arange(len(ids))
            segment[r, span] = s
            source.append(wanted[i].nonzero().flatten() + (r * width + at))
            target.append(torch.arange(bounds[i], bounds[i + 1]))
            at += len(ids)
        firsts.append(r * width + at)  # padding, or where the next row begins
    packed = any(len(row) > 1 for row in rows)
    starts = torch.tensor([*firsts, len(rows) * width], dtype=torch.int32).unique()
    return Forward(input_ids, position, segment, packed, starts, torch.cat(source), torch.cat(target))
