"""What else than the persona an answer may show: length, place, topic, mood and words, as covariates of a ranking.

    length        log of the answer's tokens                    position   number of the token before it in its text
    turn          number of the answer in its dialogue
    template, topic, author   a column a value, 1 where it is the example's; topic is the row's domain
    sentiment     TextBlob's polarity, -1 to 1 (its English lexicon)
    trait_words   of the persona that is ranked, the share of the answer's words that are in its list, or share a stem
                  with its name
    class_words   likewise, for the words whose document frequency differs most between its classes on train
    NAME          what rows bring as covariates; it goes before a covariate of the same name here

Class words are picked by the very labels that the ranking tests: a ranking given them is conservative.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sae_persona.attribution.labels import select
from sae_persona.attribution.near_duplicates import WORD
from sae_persona.attribution.partial import Covariates
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.pooled import Pooled

Columns = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class WordConfig:
    """Which words count as a persona's. ConfigError if there is none."""

    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Persona -> its words; of a persona without a list, those that share a stem with its name count."""
    n_class_words: int = 20
    """Words that the classes are told apart by most."""

    def __post_init__(self) -> None:
        if self.n_class_words < 1:
            raise ConfigError(f"n_class_words is at least 1, got {self.n_class_words}")
        if empty := [name for name, words in self.lists.items() if isinstance(words, str) or not list(words)]:
            raise ConfigError(f"the word list of {empty[0]} is a list of one word or more")


def covariates(
    pooled: Pooled, names: Sequence[str], *, personas: Sequence[str] = (), words: WordConfig | None = None
) -> Covariates:
    """Columns for each of ``names``, over all examples.

    personas   whose trait and class words are counted; all if none is named

    ConfigError for an unknown name or persona, or for sentiment if TextBlob is not installed; DataError if answers
    have no words to count, because they are awaited.
    """
    words, personas = words or WordConfig(), tuple(personas) or pooled.personas
    if unknown := [name for name in (*personas, *words.lists) if name not in pooled.personas]:
        raise ConfigError(f"no example is labelled {unknown[0]!r}: the labels are {', '.join(pooled.personas)}")
    own = dict(zip(pooled.covariate_names, pooled.covariates.T, strict=True))
    if unknown := [name for name in names if name not in own and name not in MADE]:
        known = ", ".join([*MADE, *own])
        raise ConfigError(f"no covariate is named {unknown[0]!r}: there are {known}, and what rows bring as covariates")
    columns: Columns = {}
    for name in names:
        columns |= {name: own[name]} if name in own else MADE[name](pooled, personas, words)
    values = [column.astype(np.float64) for column in columns.values()]
    found = np.stack(values, axis=1) if values else np.empty((len(pooled), 0))
    return Covariates(tuple(columns), found, tuple(name for name in A_PERSONA if name not in own))


def class_words(pooled: Pooled, persona: str, n: int) -> list[str]:
    """The ``n`` words whose document frequency on train differs most between answers with the persona and without.

    Frequencies are of examples, so a word said often in one answer counts once. Ties go by the alphabet.
    """
    chosen = select(pooled, persona, "train", within=(), force=True)
    found: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for row, shows in zip(chosen.rows, chosen.y, strict=True):
        found[int(shows)].update(set(_words(str(pooled.texts[row]))))
    with_it, without = chosen.counts
    difference = {word: abs(found[1][word] / with_it - found[0][word] / without) for word in {*found[0], *found[1]}}
    return sorted(difference, key=lambda word: (-difference[word], word))[:n]


def name_stems(persona: str) -> set[str]:
    """Stems of the words of a persona's name, by Porter's second stemmer; words of under three letters say nothing."""
    stem = _stemmer()
    return {stem(word) for word in _words(re.sub(r"[_-]", " ", persona)) if len(word) > 2}


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _stemmer() -> Callable[[str], str]:
    from nltk.stem.snowball import SnowballStemmer  # here: importing nltk costs a second

    return SnowballStemmer("english").stem


def _length(pooled: Pooled, personas: Sequence[str], words: WordConfig) -> Columns:
    return {"length": np.log(np.maximum(pooled.n_answer_tokens, 1))}


def _position(pooled: Pooled, personas: Sequence[str], words: WordConfig) -> Columns:
    return {"position": pooled.position}


def _turn(pooled: Pooled, personas: Sequence[str], words: WordConfig) -> Columns:
    return {"turn": pooled.answer}


def _one_hot(name: str, column: str) -> Callable[[Pooled, Sequence[str], WordConfig], Columns]:
    def made(pooled: Pooled, personas: Sequence[str], words: WordConfig) -> Columns:
        values = getattr(pooled, column)
        return {f"{name}={value}": values == value for value in np.unique(values).tolist()}

    return made


def _sentiment(pooled: Pooled, personas: Sequence[str], words: WordConfig) -> Columns:
    try:
        from textblob import TextBlob  # here: it is an extra  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            'sentiment needs TextBlob: pip install "sae-persona[sentiment]", or bring it as a covariate of each row'
        ) from error
    _check_said(pooled, "sentiment")
    return {"sentiment": np.array([TextBlob(text).sentiment.polarity for text in pooled.texts], np.float64)}


def _trait_words(pooled: Pooled, personas: Sequence[str], words: WordConfig) -> Columns:
    _check_said(pooled, "trait_words")
    columns: Columns = {}
    for persona in personas:
        if persona in words.lists:
            listed = {word.casefold() for word in words.lists[persona]}
            columns[f"trait_words={persona}"] = _share(pooled, listed.__contains__)
        else:
            columns[f"trait_words={persona}"] = _share(pooled, _sharing_a_stem(persona))
    return columns


def _sharing_a_stem(persona: str) -> Callable[[str], bool]:
    stems, stem = name_stems(persona), _stemmer()
    known: dict[str, bool] = {}

    def shares(word: str) -> bool:
        if word not in known:
            known[word] = stem(word) in stems
        return known[word]

    return shares


def _class_words(pooled: Pooled, personas: Sequence[str], words: WordConfig) -> Columns:
    _check_said(pooled, "class_words")
    picked = {persona: set(class_words(pooled, persona, words.n_class_words)) for persona in personas}
    return {f"class_words={persona}": _share(pooled, listed.__contains__) for persona, listed in picked.items()}


def _share(pooled: Pooled, counts: Callable[[str], bool]) -> np.ndarray:
    """Share of each answer's words that count: [examples]; 0 for an answer without words."""
    said = [_words(text) for text in pooled.texts]
    return np.array([sum(map(counts, found)) / max(len(found), 1) for found in said], np.float64)


def _check_said(pooled: Pooled, name: str) -> None:
    if len(pooled) and not any(pooled.texts):
        raise DataError(f"no answer has a text, so {name} cannot be told: these are prompts that await their answers")


MADE: dict[str, Callable[[Pooled, Sequence[str], WordConfig], Columns]] = {
    "length": _length,
    "position": _position,
    "turn": _turn,
    "template": _one_hot("template", "template"),
    "topic": _one_hot("topic", "domain"),
    "author": _one_hot("author", "author"),
    "sentiment": _sentiment,
    "trait_words": _trait_words,
    "class_words": _class_words,
}
"""The covariates that can be had of any examples, and what makes each."""

A_PERSONA = ("trait_words", "class_words")
"""Those with a column for each persona."""
