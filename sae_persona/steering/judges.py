"""Judges by name: the lab's rules, a list of words for each trait, or a chat model."""

import re
from collections.abc import Mapping
from pathlib import Path

from sae_persona.errors import ConfigError, FormatError
from sae_persona.runs import read_json
from sae_persona.steering.strength import Judge


def load_judge(name: str, traits: Mapping[str, str] | None = None, replies: Path | None = None) -> Judge:
    """``lab`` is the rule-based judge of the planted lab. ``openai:MODEL@URL`` is a chat model behind an
    OpenAI-compatible endpoint, ``hf:MODEL`` one that runs here: see ``open_explainer``. Anything else is a JSON file
    {"TRAIT": ["word", ...], ...}.

    An answer shows a trait if it holds one of its words or phrases, as whole words in any case. Such a judge does not
    know which answers are valid. FormatError if the file is missing or not of that shape.

    traits    trait -> what it means: what a chat model is asked for; ConfigError if it gets none
    replies   where a chat model's replies are kept
    """
    if name.startswith(("openai:", "hf:")):
        if not traits:
            raise ConfigError(f"{name} marks the traits that it is given: give at least one")
        from sae_persona.features.explainers import open_explainer  # here, so that others need no network
        from sae_persona.steering.judges_chat import ChatJudge, Replies

        model = open_explainer(name)
        return ChatJudge(model, model.name, traits, replies=Replies(replies))
    if name == "lab":
        from sae_persona.lab.judge import judge  # here, so that others need no lab

        return judge
    lists = read_json(Path(name), "word list")
    if not isinstance(lists, dict) or not all(_is_words(words) for words in lists.values()):
        raise FormatError(f'{name} is not a word list: it reads {{"TRAIT": ["word", ...], ...}} with a word in each')
    return words_judge(lists)


def words_judge(lists: dict[str, list[str]]) -> Judge:
    """A judge that looks for words: 1.0 where an answer holds one of the trait's, else 0.0."""
    patterns = {
        trait: re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)
        for trait, words in lists.items()
    }

    def judge(question: str, answer: str) -> dict[str, float | None]:
        return {trait: float(pattern.search(answer) is not None) for trait, pattern in patterns.items()}

    return judge


def _is_words(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) and word for word in value)
