"""The feature dictionary of a run as one SQLite file: numbers, descriptions and contexts of each latent, by word.

    facts      one row of JSON: kind, format, n_latents, n_tokens, and the inputs that it was made of
    numbers    firing_rate, mean, p999, maximum: each an array [n_latents] of fp64, little-endian
    features   FTS5, a row a latent (rowid = latent): explanation, promoted, suppressed, tokens (those on which it fires
               hardest), contexts (all of them, SEPARATOR between); `places` is not indexed: where in them it fires
    described  FTS5 without content, the same rows' first four columns: a tenth of the text, so searched first

Words are cut by unicode61, which folds case and accents, and not stemmed: many latents fire on one form of a word, and
a stemmer would make it English only and prefixes unreliable. Prefixes of two and three letters have an index.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from sae_persona.errors import FormatError, RunError
from sae_persona.features.descriptions import Description
from sae_persona.features.readable import ContextText
from sae_persona.features.stats import LatentStats
from sae_persona.runs import write_whole

FORMAT = 1
SEPARATOR = " \ue000 "
"""Of private use, and a token of its own to unicode61: no phrase reaches from one context into the next."""
HIT, END = "\x01", "\x02"
"""Around what a query has found."""
_PLAIN = str.maketrans({"\ue000": " ", HIT: " ", END: " "})
COLUMNS = ("explanation", "promoted", "suppressed", "tokens", "contexts")
NUMBERS = ("firing_rate", "mean", "p999", "maximum")
_CUT = "tokenize = 'unicode61 remove_diacritics 2', prefix = '2 3'"


def write_dictionary(
    path: Path,
    stats: LatentStats,
    contexts: Iterable[list[ContextText]],
    descriptions: Mapping[int, Description],
    inputs: Mapping[str, Any],
) -> None:
    """Write the file, whole or not at all.

    contexts   of every latent, in order
    inputs     what the file is made of, kept in it as JSON

    RunError if the disk refuses.
    """
    facts = {"kind": "dictionary", "format": FORMAT, "n_latents": stats.n_latents, "n_tokens": stats.n_tokens}
    numbers = {name: getattr(stats, name).double().cpu().numpy().astype("<f8").tobytes() for name in NUMBERS}

    def fill(temporary: Path) -> None:
        # no journal: the file is put in place only when it is whole
        with closing(sqlite3.connect(temporary, isolation_level=None)) as db:
            db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -200000; BEGIN")
            db.execute("CREATE TABLE facts (value TEXT)")
            db.execute("CREATE TABLE numbers (name TEXT PRIMARY KEY, data BLOB)")
            db.execute(f"CREATE VIRTUAL TABLE features USING fts5({', '.join(COLUMNS)}, places UNINDEXED, {_CUT})")
            db.execute(f"CREATE VIRTUAL TABLE described USING fts5({', '.join(COLUMNS[:-1])}, content = '', {_CUT})")
            db.execute("INSERT INTO facts VALUES (?)", [json.dumps({**facts, "inputs": dict(inputs)})])
            db.executemany("INSERT INTO numbers VALUES (?, ?)", numbers.items())
            for row in _rows(contexts, descriptions):
                db.execute(
                    "INSERT INTO features (rowid, " + ", ".join(COLUMNS) + ", places) VALUES (?,?,?,?,?,?,?)", row
                )
                db.execute("INSERT INTO described (rowid, " + ", ".join(COLUMNS[:-1]) + ") VALUES (?,?,?,?,?)", row[:5])
            for table in ("features", "described"):
                db.execute(f"INSERT INTO {table} ({table}) VALUES ('optimize')")
            db.execute("COMMIT")

    try:
        write_whole(path, fill)
    except sqlite3.OperationalError as error:  # how SQLite tells of a full disk
        raise RunError(f"cannot write {path}: {error}. Free some space.") from error


def _rows(contexts: Iterable[list[ContextText]], descriptions: Mapping[int, Description]) -> Iterator[tuple]:
    for latent, shown in enumerate(contexts):
        about = descriptions.get(latent, Description(latent=latent))
        tokens = dict.fromkeys(context.token.strip() for context in shown)
        texts = (
            about.explanation or "",
            " · ".join(token.strip() for token, _ in about.promoted),
            " · ".join(token.strip() for token, _ in about.suppressed),
            " · ".join(tokens),
            SEPARATOR.join(context.text.translate(_PLAIN) for context in shown),
        )
        places = json.dumps([(context.start, context.stop, context.strength) for context in shown])
        yield latent, *(text.translate(_PLAIN) for text in texts[:-1]), texts[-1], places


@dataclass(frozen=True)
class Entry:
    """What the dictionary says of one latent."""

    latent: int
    explanation: str
    promoted: str
    suppressed: str
    tokens: str
    contexts: tuple[ContextText, ...]
    """Strongest first; if they were looked up for a query, those that it is found in most often come first."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """The file, open for reading."""

    path: Path
    db: sqlite3.Connection
    facts: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Self:
        """FormatError if it is missing, no such file, or of another format."""
        try:
            db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
            (text,) = db.execute("SELECT value FROM facts").fetchone()
            facts = json.loads(text)
        except (sqlite3.DatabaseError, TypeError, json.JSONDecodeError) as error:
            raise FormatError(f"{path} is not a feature dictionary: {error}") from error
        if facts.get("format") != FORMAT:
            db.close()
            raise FormatError(f"{path} has dictionary format {facts.get('format')}, this version reads {FORMAT}")
        db.executescript("PRAGMA mmap_size = 4294967296; PRAGMA cache_size = -65536")
        return cls(path, db, facts)

    def close(self) -> None:
        self.db.close()

    @property
    def n_latents(self) -> int:
        return self.facts["n_latents"]

    @cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        """firing_rate, mean, p999 (NaN where it never fired) and maximum: [n_latents] fp64 each."""
        return {name: np.frombuffer(data, "<f8") for name, data in self.db.execute("SELECT name, data FROM numbers")}

    def entries(self, latents: Iterable[int], query: str | None = None) -> list[Entry]:
        """What is said of these latents, in their order. ``query``: FTS5, by which their contexts are put in order."""
        return [self._entry(int(latent), query) for latent in latents]

    def _entry(self, latent: int, query: str | None) -> Entry:
        row = None
        if query is not None:
            sql = "SELECT explanation, promoted, suppressed, tokens, highlight(features, 4, ?, ?), places FROM features"
            row = self.db.execute(f"{sql} WHERE features MATCH ? AND rowid = ?", (HIT, END, query, latent)).fetchone()
        if row is None:
            sql = f"SELECT {', '.join(COLUMNS)}, places FROM features WHERE rowid = ?"
            row = self.db.execute(sql, (latent,)).fetchone()
        explanation, promoted, suppressed, tokens, contexts, places = row
        # most hits first; the sort is stable, so of equal ones the strongest
        found = [(text.count(HIT), text) for text in contexts.split(SEPARATOR)] if contexts else []
        order = sorted(range(len(found)), key=lambda i: -found[i][0])
        places = json.loads(places)
        shown = [ContextText(found[i][1].replace(HIT, "").replace(END, ""), *places[i]) for i in order]
        return Entry(latent, explanation, promoted, suppressed, tokens, tuple(shown))
