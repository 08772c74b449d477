"""Latents by word: FTS5 queries over the feature dictionary, best first, in bounded time.

Order: first the latents whose description and strongest tokens satisfy the query, by bm25 with WEIGHTS; then those of
which that is true only with their contexts, likewise. bm25 takes time for each place where a word stands, and a word
that is everywhere tells little, so of more than ``RANKED`` latents that satisfy a query in one of the two only the
first ``RANKED`` are put in order; `Words.cut` says so.
"""

import re
import sqlite3
from dataclasses import dataclass

import numpy as np

from sae_persona.errors import ConfigError, DataError
from sae_persona.features.dictionary import Dictionary

WEIGHTS = {"explanation": 10.0, "promoted": 4.0, "suppressed": 1.0, "tokens": 6.0, "contexts": 1.0}
"""Of each column in bm25."""
RANKED = 8192
"""What bm25 does in ten milliseconds."""
SYNTAX = 'words that must all occur, "a phrase", begin*, AND, OR, NOT, NEAR(a b), COLUMN: word'


@dataclass(frozen=True)
class Words:
    """Latents that a query finds, best first; ``score`` is bm25's, larger is better."""

    latents: np.ndarray
    score: np.ndarray
    cut: bool = False
    """Whether more than RANKED latents satisfied the query, so that not all were put in order."""


def quoted(text: str) -> str:
    """An FTS5 query for exactly these words, whatever signs are in them; all must occur."""
    return " ".join('"' + word.replace('"', '""') + '"' for word in text.split())


def find_words(dictionary: Dictionary, query: str, limit: int, allowed: np.ndarray | None = None) -> Words:
    """The ``limit`` best latents for an FTS5 query.

    allowed   [n_latents] bool, or None: all latents

    ConfigError for an empty query, DataError for one that does not parse.
    """
    _check(dictionary, query)
    if allowed is not None:
        _allow(dictionary, allowed)
    # of what NOT forbids, a description knows only half
    first = [] if re.search(r"\bNOT\b", query) else _ranked(dictionary, "described", query, limit, allowed is not None)
    cut = len(first) and first[0][2] >= RANKED
    rows = [row[:2] for row in first]
    if len(rows) < limit:
        seen = {latent for latent, _ in rows}
        more = _ranked(dictionary, "features", query, limit + len(rows), allowed is not None)
        cut = cut or (len(more) and more[0][2] >= RANKED)
        rows += [row[:2] for row in more if row[0] not in seen][: limit - len(rows)]
    return Words(np.array([row[0] for row in rows], np.int64), np.array([row[1] for row in rows], float), bool(cut))


def having_words(dictionary: Dictionary, query: str) -> np.ndarray:
    """Which latents satisfy a query, wherever its words stand: bool [n_latents]. Errors as `find_words`."""
    _check(dictionary, query)
    found = np.zeros(dictionary.n_latents, bool)
    rows = dictionary.db.execute("SELECT rowid FROM features WHERE features MATCH ?", (query,)).fetchall()
    found[[latent for (latent,) in rows]] = True
    return found


def _check(dictionary: Dictionary, query: str) -> None:
    if not query.strip():
        raise ConfigError("nothing to search for: give a word, a latent, a vector, a persona or a range")
    try:
        for table in ("features", "described"):
            if table == "features" or not re.search(r"\bcontexts\b", query):
                dictionary.db.execute(f"SELECT rowid FROM {table} WHERE {table} MATCH ? LIMIT 1", (query,)).fetchone()
    except sqlite3.OperationalError as error:
        reason = str(error).removeprefix("fts5: ").replace('near ""', "at its end")
        if named := re.fullmatch(r"no such column: (.*)", reason):
            reason = f"{named[1]} is not a column; columns are {', '.join(WEIGHTS)}"
        elif reason.startswith("unknown special query"):
            reason = "an asterisk stands after the letters that words begin with"
        raise DataError(
            f"the query {query!r} does not parse: {reason}. It reads {SYNTAX}. For its plain words: {quoted(query)}, "
            "or --plain"
        ) from error


def _allow(dictionary: Dictionary, allowed: np.ndarray) -> None:
    """Leave the allowed latents in a temporary table, which a read-only connection may write."""
    dictionary.db.executescript("CREATE TEMP TABLE IF NOT EXISTS allowed (latent INTEGER PRIMARY KEY); BEGIN")
    dictionary.db.execute("DELETE FROM temp.allowed")
    rows = ((latent,) for latent in np.flatnonzero(allowed).tolist())
    dictionary.db.executemany("INSERT INTO temp.allowed VALUES (?)", rows)
    dictionary.db.execute("COMMIT")


def _ranked(dictionary: Dictionary, table: str, query: str, limit: int, some: bool) -> list[tuple[int, float, int]]:
    """Latent, score and how many satisfied the query, for the best of them in one of the two tables."""
    weights = list(WEIGHTS.values())
    if table == "described":
        if re.search(r"\bcontexts\b", query):  # a column that this table has not
            return []
        weights = weights[:-1]
    # + keeps SQLite from asking the index once for each latent
    only = "AND +rowid IN (SELECT latent FROM temp.allowed)" if some else ""
    inner = (
        f"SELECT rowid AS latent, -bm25({table}, {', '.join(map(str, weights))}) AS score FROM {table} "
        f"WHERE {table} MATCH ? {only} LIMIT {RANKED}"
    )
    sql = f"SELECT latent, score, COUNT(*) OVER () FROM ({inner}) ORDER BY score DESC, latent LIMIT ?"
    return dictionary.db.execute(sql, (query, limit)).fetchall()
