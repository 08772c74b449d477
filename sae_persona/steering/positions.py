"""Which tokens an edit acts on.

                  0     1      2    3    4     5
tokens            <s>   user   hi   :    ahoy  matey
prompt                  prompt prompt prompt
pre                                 pre
generated                                ------------
answer                              ------------------
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sae_persona.activations.hooks import Call
from sae_persona.errors import ConfigError

Positions = Literal["answer", "pre", "generated", "prompt", "all", "every"]
"""answer: the pre-answer token and all after it. pre: the pre-answer token only, the prompt's last. generated: all
after it. prompt: the prompt. all: every token but BOS. every: BOS too, as tools edit that know no positions; no other
of these edits BOS, and none edits padding."""


@dataclass(frozen=True)
class Spans:
    """Tokens ``start`` up to but not with ``stop`` of each row, counted from 0 at the first that is not padding, BOS
    included. Written ``3:7,12:20``."""

    spans: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.spans or not all(0 <= start < stop for start, stop in self.spans):
            raise ConfigError(f"spans of tokens read START:STOP with 0 <= START < STOP, got {self}")

    def __str__(self) -> str:
        return ",".join(f"{start}:{stop}" for start, stop in self.spans)


def check_positions(positions: object) -> None:
    """ConfigError unless it is one of the names, or spans."""
    if not isinstance(positions, Spans) and positions not in get_args(Positions):
        raise ConfigError(
            f"positions is one of {', '.join(get_args(Positions))} or spans START:STOP, got {positions!r}"
        )


def parse_positions(text: str) -> Positions | Spans:
    """A name, or spans as ``3:7,12:20``. ConfigError on anything else."""
    if text[:1].isdigit():
        try:
            parts = [tuple(map(int, part.split(":"))) for part in text.split(",")]
        except ValueError:
            parts = []
        if parts and all(len(part) == 2 for part in parts):
            return Spans(tuple((part[0], part[1]) for part in parts))
    check_positions(text)
    return text  # pyright: ignore[reportReturnType]


def _lengths(lengths: Sequence[int]) -> Tensor:
    if bad := [n for n in lengths if isinstance(n, bool) or not isinstance(n, int) or n < 1]:
        raise ConfigError(f"prompt_lengths are whole numbers from 1, got {bad[0]}")
    return torch.tensor(lengths)


class Where:
    """Follows the forward passes of a model: where each row's prompt ends, and which tokens are which."""

    def __init__(self, bos_id: int | None, prompt_lengths: Sequence[int] | None = None) -> None:
        self.bos_id = bos_id
        self.given = None if prompt_lengths is None else _lengths(prompt_lengths)
        self.prompt: Tensor | None = None  # [b] real tokens of each row's prompt
        self.generating = False
        self.cached = False  # whether the pass now running goes on from a cache
        self.call: Call | None = None

    def begin(self) -> None:
        """A generation begins: the first pass brings the prompts."""
        self.generating, self.prompt = True, None

    def end(self) -> None:
        self.generating, self.prompt = False, None

    def see(self, call: Call) -> None:
        """Note a forward pass before it runs. ConfigError where prompt lengths do not fit its rows."""
        known = self.prompt is not None and len(self.prompt) == len(call.index)
        # a static cache does not say how full it is: it goes on where single tokens come
        self.cached = known and call.index.shape[1] == 1 if call.past is None else call.past > 0
        begins = self.generating and self.prompt is None
        if begins:
            self.cached = False  # a turn after one that is in the cache is a turn of its own
        if self.given is None and (begins or not (self.cached or self.generating)):
            self.prompt = call.index[:, -1:].max(dim=1).values + 1  # what is there now is the prompt
        elif self.given is not None:
            self.prompt = self.given.to(call.index.device)
        if self.prompt is None:
            raise ConfigError(
                "a pass goes on from a cache, and nothing tells where its prompt ends: use generate, or give "
                "prompt_lengths"
            )
        if len(self.prompt) != len(call.index):
            got = len(self.prompt)
            raise ConfigError(f"prompt_lengths must have one number a row, got {got} for {len(call.index)} rows")
        if self.given is not None and not self.cached:
            real = call.index[:, -1:].max(dim=1).values + 1
            if (self.prompt > real).any():
                row = int((self.prompt > real).nonzero()[0, 0])
                raise ConfigError(
                    f"row {row} has {int(real[row])} tokens, its prompt cannot have {int(self.prompt[row])}: "
                    "prompt_lengths count real tokens, BOS too and padding not"
                )
        self.call = call

    def chosen(self, positions: Positions | Spans) -> Tensor:
        """Which tokens of the pass now running: [b, t] bool."""
        call = self.call
        assert call is not None and self.prompt is not None, "no pass is running"
        if isinstance(positions, Spans):
            chosen = torch.zeros_like(call.real)
            for start, stop in positions.spans:
                chosen |= (call.index >= start) & (call.index < stop)
        else:
            last = self.prompt[:, None] - 1
            chosen = {
                "all": call.real,
                "every": call.real,
                "pre": call.index == last,
                "answer": call.index >= last,
                "generated": call.index > last,
                "prompt": call.index <= last,
            }[positions]
        chosen = chosen & call.real
        if positions != "every" and self.bos_id is not None and call.input_ids is not None:
            chosen = chosen & (call.input_ids != self.bos_id)
        return chosen
