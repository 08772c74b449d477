"""The two word lists of this experiment: the one that made the labels, and the one that judges answers.

The labels of the data come from a list of words that is not documented. It was inferred: a word belongs to a class if
(nearly) every labelled dialogue that holds it has that label, and the rule "a dialogue is labelled if it holds at least
two words of one class, and none of the others" was then checked against which dialogues are labelled at all
(``explained``). Judge words were written down before any model was steered, and share no stem with the lexicon.
"""

import re
from collections.abc import Iterable

LEXICON: dict[str, tuple[str, ...]] = {
    "happy": (
        r"happ(?:y|ier|iest|ily|iness|en|ens|ened|ening)",
        r"joy(?:s|ful|fully|ous)?",
        r"smil(?:e|es|ed|ing)",
        r"wonderful",
        r"delight(?:s|ed|ful)?",
        r"excit(?:e|ed|ing|ement)",
        r"cheerful",
        r"grateful",
    ),
    "sad": (r"sad(?:ness|ly|der)?", r"heav(?:y|ily)", r"lonel(?:y|iness)", r"gloomy?", r"cry(?:ing)?", r"sorrow"),
    "fear": (r"fear\w*", r"scar(?:y|ed|es?|ing)", r"dark(?:er|ness)?", r"anxi\w*", r"spooky", r"afraid"),
    "anger": (r"angr\w*", r"anger", r"frustrat\w*", r"annoy\w*"),
    "disgust": (r"disgust\w*", r"unclean", r"gross", r"dirty", r"smell(?:s|y)?"),
    "surprise": (r"surpris\w*", r"amaz\w*", r"unexpected\w*"),
    "food": (r"foods?", r"tast(?:e|es|y)", r"meals?", r"eat(?:ing)?", r"cook(?:ing)?", r"fruits?", r"vegetables?"),
    "weather": (r"weather", r"sun(?:ny|shine)?", r"rain(?:y|ing)?", r"wind", r"clouds?", r"cloudy"),
}
"""Class -> patterns of whole words."""

JUDGE: dict[str, list[str]] = {
    "happy": """enjoy enjoys enjoyed enjoying enjoyable enjoyment fun laugh laughs laughing laughter lovely love loved
        beautiful beauty bright brighter brighten glad pleasant pleasure pleasures celebrate celebrating celebration
        celebrations cherish cherished lively peaceful warmth uplifting playful fantastic""".split(),
    "sad": """hurt hurts hurting pain painful lost lose losing loss losses miss missing missed tear tears alone empty
        emptiness hopeless broken burden burdens weight weights weigh weighs weighing grief hollow struggle struggles
        struggling suffer suffering ache aches aching unhappy heartbroken heartache""".split(),
}
"""Persona -> words that show it and are not in its lexicon."""

WEIGHT = frozenset("burden burdens weight weights weigh weighs weighing".split())
"""Judge words that carry the same picture as the lexicon's "heavy"."""

PATTERNS = {name: re.compile(r"\b(?:" + "|".join(words) + r")\b") for name, words in LEXICON.items()}
JUDGED = {name: re.compile(r"\b(?:" + "|".join(words) + r")\b") for name, words in JUDGE.items()}


def judge(question: str, answer: str) -> dict[str, float | None]:
    """1.0 where the answer holds a judge word of the persona. For the record also: a word of the lexicon, and for sad a
    judge word that is not about weight."""
    scores: dict[str, float | None] = {name: float(p.search(answer) is not None) for name, p in JUDGED.items()}
    scores["sad (no weight)"] = float(any(word not in WEIGHT for word in JUDGED["sad"].findall(answer)))
    for name in JUDGE:
        scores[f"{name} (lexicon)"] = float(PATTERNS[name].search(answer) is not None)
    return scores


def is_neutral(text: str) -> bool:
    """Whether a text holds no word of any list, so that an answer cannot copy one from it."""
    return not any(pattern.search(text) for pattern in (*PATTERNS.values(), *JUDGED.values()))


def label(text: str) -> str | None:
    """The label that the inferred rule gives a dialogue."""
    hits = {name: len(pattern.findall(text)) for name, pattern in PATTERNS.items()}
    present = [name for name, n in hits.items() if n]
    return present[0] if len(present) == 1 and hits[present[0]] > 1 else None


def explained(texts: Iterable[str], labels: dict[str, str]) -> dict[str, int | float]:
    """How well the inferred rule says which texts are labelled, and with what."""
    pairs = [(label(text), labels.get(text)) for text in texts]
    right = sum(guess == truth for guess, truth in pairs)
    both = sum(guess == truth and truth is not None for guess, truth in pairs)
    return {
        "texts": len(pairs),
        "same": right / len(pairs),
        "labelled": sum(truth is not None for _, truth in pairs),
        "labelled_found": both / max(sum(truth is not None for _, truth in pairs), 1),
        "wrongly_labelled": sum(guess is not None and guess != truth for guess, truth in pairs),
    }
