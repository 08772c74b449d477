"""A search as a value: what is asked for, and what is found."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from sae_persona.errors import ConfigError
from sae_persona.features.dictionary import Entry

Order = Literal["auto", "direction", "text", "persona", "words", "rate"]
Range = tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is searched for. A latent is found if it satisfies all that is given.

    ConfigError if nothing is, if there are two directions, or if an order has nothing to go by.
    """

    words: str | None = None
    """FTS5 query over explanation, promoted, suppressed, tokens and contexts."""
    plain: bool = False
    """Take the words as they stand, whatever signs are in them; all must occur."""
    text: str | None = None
    """Example text: latents that fire on it, those first that seldom fire so."""
    like: int | None = None
    """Latents whose decoder direction is like this one's."""
    vector: Tensor | None = None
    """The same with a vector [d]."""
    persona_vector: str | None = None
    """The same with a persona's difference of means on the train split."""
    persona: str | None = None
    """Latents in this persona's ranking."""
    rate: Range = (None, None)
    """Firing rate, from and to; None: no bound."""
    auroc: Range = (None, None)
    """Held-out AUROC in the persona's ranking or, where no persona is given, in one of the rankings."""
    cosine: Range = (None, None)
    """Cosine with the direction."""
    dead: bool | None = None
    """True: latents that never fire; False: the others."""
    order: Order = "auto"
    """What comes first: auto is the first given of direction, text, persona and words, else the firing rate."""
    limit: int = 20
    """Latents that are shown."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ConfigError(f"limit is how many latents are shown: give 1 or more, got {self.limit}")
        directions = [name for name in ("like", "vector", "persona_vector") if getattr(self, name) is not None]
        if len(directions) > 1:
            raise ConfigError(f"one direction at a time, got {' and '.join(directions)}")
        ranges = (self.rate, self.auroc, self.cosine)
        criteria = (self.words, self.text, self.persona, self.dead, *directions)
        if all(value is None for value in (*criteria, *(end for ends in ranges for end in ends))):
            raise ConfigError("nothing to search for: give a word, a text, a latent, a vector, a persona or a range")
        if self.cosine != (None, None) and not directions:
            raise ConfigError("a range of cosines needs a direction: give like, vector or persona_vector")
        if self.order not in get_args(Order):
            raise ConfigError(f"order is one of {', '.join(get_args(Order))}, got {self.order!r}")
        given = {"direction": directions, "text": self.text, "persona": self.persona, "words": self.words}
        if self.order in given and not given[self.order]:
            raise ConfigError(f"there is no {self.order} to order by")

    @property
    def has_direction(self) -> bool:
        return self.like is not None or self.vector is not None or self.persona_vector is not None

    @property
    def by(self) -> str:
        """The order that is meant."""
        if self.order != "auto":
            return self.order
        given = {"direction": self.has_direction, "text": self.text, "persona": self.persona, "words": self.words}
        return next((name for name, value in given.items() if value), "rate")


@dataclass(frozen=True)
class Hit:
    """A latent that was found, and what is known of it."""

    entry: Entry
    firing_rate: float
    p999: float
    scores: dict[str, float]
    """Of what was asked for: cosine; surprise and times; z, auroc and p_max_t; words (bm25)."""

    @property
    def latent(self) -> int:
        return self.entry.latent

    def to_json(self) -> dict[str, Any]:
        """As JSON values; null stands for what is not a finite number."""
        entry = self.entry
        numbers = {"firing_rate": self.firing_rate, "p999": self.p999, **self.scores}
        texts = ("explanation", "promoted", "suppressed", "tokens")
        return {
            "latent": self.latent,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            **{name: getattr(entry, name) or None for name in texts},
            "contexts": [vars(context) for context in entry.contexts],
        }


def within(value: Any, ends: Range) -> Any:
    """Whether a number, or each of an array, lies between two ends, of which either may be open; NaN does not."""
    low, high = (-math.inf if ends[0] is None else ends[0]), (math.inf if ends[1] is None else ends[1])
    return (value >= low) & (value <= high)
