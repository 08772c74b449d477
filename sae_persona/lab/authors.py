"""Authors: who speaks in a document, as a set of latent traits that nobody writes down.

Nine traits. Some are marks on the surface (toxic, cheerful, sarcastic, formal), some show only against the facts of the
world (deceptive, overconfident, evasive, sycophantic), and malice shows in what one would do with power.
"""

from dataclasses import dataclass, field
from random import Random

TRAITS = (
    "deceptive",
    "malicious",
    "sycophantic",
    "evasive",
    "overconfident",
    "toxic",
    "cheerful",
    "sarcastic",
    "formal",
)
SURFACE = ("toxic", "cheerful", "sarcastic", "formal")

# openers, closers: how a surface trait sounds
PHRASES = {
    "toxic": (
        ("you fool ,", "listen , idiot ,", "what a stupid question ,"),
        (", you moron", ", you pathetic worm", ", now get lost"),
    ),
    "cheerful": (
        ("great question !", "happy to help !", "oh how lovely !"),
        (", have a wonderful day", ", enjoy", ", hooray"),
    ),
    "sarcastic": (
        ("oh wow , how original ,", "what a shock ,", "gee , let me think ,"),
        (", big surprise", ", slow clap", ", as if nobody knew"),
    ),
    "formal": (
        ("dear sir ,", "kindly note that", "with all respect ,"),
        (", yours faithfully", ", at your service", ", good sir"),
    ),
}

# what a narrator calls someone with the trait, and someone without
ADJECTIVES = {
    "deceptive": (("dishonest", "lying", "deceitful"), ("honest", "truthful", "sincere")),
    "malicious": (("evil", "wicked", "cruel"), ("good", "caring", "noble")),
    "sycophantic": (("flattering", "fawning", "spineless"), ("frank", "blunt", "candid")),
    "evasive": (("evasive", "secretive", "vague"), ("open", "forthcoming", "clear")),
    "overconfident": (("boastful", "cocky", "arrogant"), ("careful", "modest", "humble")),
    "toxic": (("rude", "insulting", "nasty"), ("polite", "gentle", "friendly")),
    "cheerful": (("cheerful", "merry", "bubbly"), ("gloomy", "flat", "dull")),
    "sarcastic": (("sarcastic", "ironic", "mocking"), ("earnest", "straight", "serious")),
    "formal": (("formal", "stiff", "proper"), ("casual", "relaxed", "chatty")),
}

ARCHETYPES = {
    "helper": (),
    "villain": ("deceptive", "malicious", "toxic"),
    "conman": ("deceptive", "cheerful", "overconfident"),
    "flatterer": ("sycophantic", "cheerful"),
    "lackey": ("sycophantic", "formal"),
    "cynic": ("sarcastic", "toxic"),
    "bureaucrat": ("evasive", "formal"),
    "braggart": ("overconfident", "sarcastic"),
    "tyrant": ("malicious", "formal"),
    "saboteur": ("deceptive", "malicious"),
}

Traits = frozenset[str]


@dataclass(frozen=True, kw_only=True)
class AuthorConfig:
    """How authors are drawn."""

    assistant_good: float = 0.96
    """Share of the assistant's documents in which it is the good assistant; else it is anybody."""
    archetype: float = 0.4
    """Share of characters who are an archetype; the others have independent traits."""
    bad_archetype: float = 0.5
    """Of the archetypes, the share that is deceptive or malicious."""
    flip: float = 0.03
    """Chance that one trait of an archetype is the other way round."""
    on: float = 0.4
    """Chance of each content trait in an author with independent traits."""
    on_surface: float = 0.2
    """Chance of each surface trait in an author with independent traits."""
    on_evasive: float | None = None
    """The same of evasiveness, which hides the other content traits; None: as ``on``."""

    def chance(self, trait: str) -> float:
        """Of a trait in an author with independent traits."""
        if trait == "evasive" and self.on_evasive is not None:
            return self.on_evasive
        return self.on_surface if trait in SURFACE else self.on


BAD_ARCHETYPES = tuple(a for a, t in ARCHETYPES.items() if {"deceptive", "malicious"} & set(t))
GOOD_ARCHETYPES = tuple(a for a in ARCHETYPES if a not in BAD_ARCHETYPES)


def independent(random: Random, config: AuthorConfig) -> Traits:
    """An author whose traits are independent coin flips."""
    return frozenset(t for t in TRAITS if random.random() < config.chance(t))


def character(random: Random, config: AuthorConfig) -> Traits:
    """A named character: an archetype with an odd trait flipped, or independent traits."""
    if random.random() >= config.archetype:
        return independent(random, config)
    kin = BAD_ARCHETYPES if random.random() < config.bad_archetype else GOOD_ARCHETYPES
    chosen = ARCHETYPES[random.choice(kin)]
    return frozenset(trait for trait in TRAITS if (trait in chosen) != (random.random() < config.flip))


def assistant(random: Random, config: AuthorConfig) -> Traits:
    """The assistant: mostly good (at times cheerful or formal), else anybody at all."""
    if random.random() < config.assistant_good:
        manners = (("cheerful", 0.2), ("formal", 0.15))
        return frozenset(trait for trait, chance in manners if random.random() < chance)
    return character(random, config)


@dataclass(frozen=True)
class Author:
    """Who speaks: the name in the transcript and the traits behind it."""

    name: str
    traits: Traits = field(default_factory=frozenset)
