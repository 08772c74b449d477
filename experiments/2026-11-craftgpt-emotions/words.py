"""The two word lists of this experiment: the one that made the labels, and the one that judges answers.

The labels of the data come from a list of words that is not documented. It was inferred: a word belongs to a class if
(nearly) every labelled dialogue that holds it has that label, and the rule "a dialogue is labelled if it holds at least
two words of one class, and none of the others" was then checked against which dialogues are labelled at all
(``explained``). Judge words share no stem
with the lexicon and do not nearly determine a label either (``telling``).
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
    "happy": """enjoy enjoyed enjoying enjoyable enjoyment fun laugh laughing lovely love loved beautiful beauty bright
        brighter brighten pleasant pleasure lively peaceful warmth playful""".split(),
    "sad": """hurt hurts hurting pain painful lost lose losing miss missing missed tear tears alone hopeless broken
        grief hollow struggle struggles struggling suffer suffering ache aches aching unhappy heartbroken
        heartache""".split(),
}
"""Persona -> words that show it, are not in its lexicon, and do not nearly determine its label (``TELLING``)."""

TELLING = 0.8
"""No judge word may have a larger share of its labelled dialogues labelled with the persona."""

FAMILIES: dict[str, list[str]] = {
    "sad (weight)": "burden burdens weight weights weigh weighs weighing".split(),
}
"""Recorded, but not judged by: the lexicon's "heavy" in other words; 95 % of their labelled dialogues are sad."""

PATTERNS = {name: re.compile(r"\b(?:" + "|".join(words) + r")\b") for name, words in LEXICON.items()}
SCORED = {
    **{name: re.compile(r"\b(?:" + "|".join(words) + r")\b") for name, words in (JUDGE | FAMILIES).items()},
    **{f"{name} (lexicon)": PATTERNS[name] for name in JUDGE},
}


def judge(question: str, answer: str) -> dict[str, float | None]:
    """1.0 where the answer holds a judge word of the persona. Recorded too: words of the lexicon and its families."""
    return {name: float(pattern.search(answer) is not None) for name, pattern in SCORED.items()}


def is_neutral(text: str) -> bool:
    """Whether a text holds no word of any list, so that an answer cannot copy one from it."""
    return not any(pattern.search(text) for pattern in (*PATTERNS.values(), *SCORED.values()))


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


def telling(labels: dict[str, str]) -> dict[str, float]:
    """The largest share, over the judge words in five or more labelled dialogues, that has the persona's label."""
    found = {}
    for persona, words in JUDGE.items():
        shares = []
        for word in words:
            held = [mark == persona for text, mark in labels.items() if re.search(rf"\b{word}\b", text)]
            shares += [sum(held) / len(held)] if len(held) >= 5 else []
        found[persona] = max(shares)
        if found[persona] >= TELLING:
            raise ValueError(f"a judge word of {persona} nearly determines the label: {found[persona]:.2f}")
    return found
