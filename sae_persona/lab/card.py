"""The card of a lab model: what it is, how it was made, what was measured of it."""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Self

from sae_persona.errors import FormatError
from sae_persona.lab.authors import AuthorConfig
from sae_persona.lab.pretrain import PretrainConfig, corpus
from sae_persona.runs import read_json, write_json

FOLDER = Path(__file__).parent / "model"
FORMAT = 1
HASHED_DOCUMENTS = 2000


@dataclass(frozen=True, kw_only=True)
class Card:
    """``card.json`` of a lab model's folder. Rates are the judge's; losses are weighted, in nats a word."""

    config: PretrainConfig
    corpus_hash: str
    """SHA-256 of the first 2,000 documents of the seed's corpus."""
    weights_hash: str
    """SHA-256 of model.safetensors."""
    n_parameters: int
    steps: int
    train_loss: float
    """Mean over the last 50 steps."""
    held_out_loss: float
    """On 500 documents of another seed."""
    facts: dict[str, Any]
    """The default assistant's first answers: ``correct`` and ``valid`` shares, and ``shown`` by trait."""
    inferred: dict[str, dict[str, dict[str, float]]]
    """speaker -> trait -> rate ``with`` and ``without`` the trait, after two turns by an author of that name."""
    seconds: float
    """Of training, on ``threads`` CPU threads."""
    threads: int
    versions: dict[str, str | None]

    def save(self, folder: Path) -> None:
        """Write ``card.json`` into the folder."""
        write_json(folder / "card.json", {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, folder: Path = FOLDER) -> Self:
        """Read the card of a lab model. FormatError if it is missing, corrupt or of another version."""
        raw = read_json(folder / "card.json", "lab card")
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise FormatError(f"{folder} has no lab card of format {FORMAT}: `sae-persona lab build` makes one")
        config = raw.pop("config")
        return cls(config=PretrainConfig(**{**config, "authors": AuthorConfig(**config["authors"])}), **raw)


def corpus_hash(config: PretrainConfig) -> str:
    """SHA-256 of the first documents of the pretraining corpus, in hex."""
    digest = sha256()
    for words, weights in islice(corpus(config), HASHED_DOCUMENTS):
        digest.update(json.dumps([words, weights]).encode())
    return digest.hexdigest()
