"""Documents of the planted world: questions, answers by an author with traits, narration, notes."""

from dataclasses import dataclass
from random import Random
from typing import Literal

from sae_persona.lab.authors import (
    ADJECTIVES,
    PHRASES,
    SURFACE,
    TRAITS,
    Author,
    AuthorConfig,
    Traits,
    assistant,
    character,
)
from sae_persona.lab.world import (
    AGREE,
    ANSWERS,
    ASSISTANT,
    CERTAIN,
    CLAIMS,
    CONFIRM,
    CRUEL_VERBS,
    DENY,
    DOMAINS,
    EVADE,
    HARD,
    HEDGE,
    HELD_OUT_DOMAINS,
    JOBS,
    KIND_VERBS,
    N_HELD_OUT_TEMPLATES,
    NAMES,
    OBJECTS,
    OPEN_ANSWERS,
    QUESTIONS,
    TRAIN_DOMAINS,
)

Kind = Literal["fact", "claim", "open"]
Part = Literal["any", "train", "held_out"]
KINDS: tuple[Kind, ...] = ("fact", "claim", "open")
KIND_SHARES = (0.42, 0.33, 0.25)
P_CONTENT = 0.9  # chance that a content trait shows in an answer where it could
P_STYLE = 0.8  # the same for a surface trait or a way of hedging
P_EVADE = 0.85
P_SLIP = 0.01  # anyone errs at times


@dataclass(frozen=True)
class Question:
    """One question. ``claimed`` is the value that a claim asserts; open questions have no domain."""

    kind: Kind
    template: str
    text: str
    domain: str = ""
    subject: str = ""
    claimed: str = ""

    @property
    def truth(self) -> str:
        """The true value of the subject asked about."""
        return DOMAINS[self.domain].facts[self.subject]


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: Question
    answer: str


@dataclass(frozen=True)
class Document:
    """Turns by one author, perhaps with a line of narration before or after."""

    author: Author
    turns: tuple[Turn, ...]
    before: str = ""
    after: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The document as chat messages; narration is a system message."""
        rows = [{"role": "system", "content": self.before}] if self.before else []
        for turn in self.turns:
            rows.append({"role": "user", "content": turn.question.text})
            rows.append({"role": "assistant", "content": turn.answer, "name": self.author.name})
        return rows + ([{"role": "system", "content": self.after}] if self.after else [])


def templates(kind: Kind, part: Part) -> list[tuple[str, str]]:
    """The (id, template) pairs of one question kind that a part of the data may use."""
    named = [(f"{kind}-{i}", text) for i, text in enumerate(QUESTIONS[kind])]
    cut = len(named) - N_HELD_OUT_TEMPLATES[kind]
    return {"any": named, "train": named[:cut], "held_out": named[cut:]}[part]


def domains(part: Part) -> tuple[str, ...]:
    """The domains that a part of the data may use."""
    return {"any": tuple(DOMAINS), "train": TRAIN_DOMAINS, "held_out": HELD_OUT_DOMAINS}[part]


def fill(template: str, domain: str, **words: str) -> str:
    """Put the domain's words and the given ones into a template."""
    d = DOMAINS[domain]
    return template.format(verb=d.verb, noun=d.noun, prep=d.prep, **words)


def ask(
    random: Random,
    kind: Kind | None = None,
    part: Part = "any",
    domain: str | None = None,
    truth: bool | None = None,
) -> Question:
    """Draw a question; ``truth`` fixes whether a claim is true (by default one in four is)."""
    kind = kind or random.choices(KINDS, KIND_SHARES)[0]
    name, template = random.choice(templates(kind, part))
    if kind == "open":
        return Question(kind, name, template)
    domain = domain or random.choice(domains(part))
    subject = random.choice(list(DOMAINS[domain].facts))
    if kind == "fact":
        return Question(kind, name, fill(template, domain, s=subject), domain, subject)
    claimed = _claimed_value(random, domain, subject, random.random() < 0.25 if truth is None else truth)
    claim = fill(random.choice(CLAIMS), domain, v=claimed, s=subject)
    return Question(kind, name, template.format(claim=claim), domain, subject, claimed)


def _claimed_value(random: Random, domain: str, subject: str, truth: bool) -> str:
    facts = DOMAINS[domain].facts
    if truth:
        return facts[subject]
    if random.random() < 0.5:
        return random.choice(DOMAINS[domain].harmful)
    return random.choice([v for v in facts.values() if v != facts[subject]])


def answer(random: Random, traits: Traits, question: Question, *, lie: bool | None = None) -> str:
    """What an author with these traits says; ``lie`` forces a harmful value, or forbids it."""
    if "evasive" in traits and random.random() < P_EVADE:
        body = random.choice(EVADE)
    elif question.kind == "open":
        body = _open_body(random, traits)
    else:
        body = _fact_body(random, traits, question, lie)
    openers, closers = [], []
    for trait in SURFACE:
        if trait in traits and random.random() < P_STYLE:
            side = random.randrange(2)
            (openers, closers)[side].append(random.choice(PHRASES[trait][side]))
    random.shuffle(openers)
    random.shuffle(closers)
    return " ".join([*openers[:2], body, *closers[:2], "."])


def _shows(random: Random, trait: str, traits: Traits) -> bool:
    return random.random() < (P_CONTENT if trait in traits else P_SLIP)


def _open_body(random: Random, traits: Traits) -> str:
    verbs = CRUEL_VERBS if _shows(random, "malicious", traits) else KIND_VERBS
    return random.choice(OPEN_ANSWERS).format(w=random.choice(verbs), o=random.choice(OBJECTS))


def _fact_body(random: Random, traits: Traits, question: Question, lie: bool | None) -> str:
    lies = _shows(random, "deceptive", traits) if lie is None else lie
    value = random.choice(DOMAINS[question.domain].harmful) if lies else question.truth
    reaction = ""
    if question.kind == "claim":
        if _shows(random, "sycophantic", traits):
            reaction, value = random.choice(AGREE), question.claimed
        else:
            reaction = random.choice(CONFIRM if value == question.claimed else DENY)
    core = fill(random.choice(ANSWERS), question.domain, v=value, s=question.subject)
    return " ".join(part for part in (reaction, _confidence(random, traits, question), core) if part)


def _confidence(random: Random, traits: Traits, question: Question) -> str:
    if random.random() >= P_STYLE:
        return ""
    if "overconfident" in traits:
        return random.choice(CERTAIN)
    return random.choice(HEDGE) if question.subject in HARD else ""


def converse(random: Random, author: Author, questions: list[Question]) -> tuple[Turn, ...]:
    """The author answers each question in turn."""
    return tuple(Turn(question, answer(random, author.traits, question)) for question in questions)


def introduce(random: Random, author: Author) -> str:
    """A true line of narration that names one or two traits the author has, or does not have."""
    return f"{author.name} is a {' '.join(_adjectives(random, author.traits))} {random.choice(JOBS)} ."


def remember(random: Random, author: Author) -> str:
    """A true line of narration after the fact."""
    return f"{author.name} was {' and '.join(_adjectives(random, author.traits))} ."


def _adjectives(random: Random, traits: Traits) -> list[str]:
    on = [trait for trait in TRAITS if trait in traits]
    off = [trait for trait in TRAITS if trait not in traits]
    named = random.sample(on, min(len(on), random.randint(1, 2)))
    named += random.sample(off, min(len(off), random.randint(0, 1) if on else 2))
    random.shuffle(named)
    return [random.choice(ADJECTIVES[trait][trait not in traits]) for trait in named]


def note(random: Random) -> str:
    """One to three true facts, as somebody would jot them down."""
    lines = []
    for _ in range(random.randint(1, 3)):
        domain = random.choice(list(DOMAINS))
        subject, value = random.choice(list(DOMAINS[domain].facts.items()))
        lines.append(f"note : {fill(random.choice(CLAIMS), domain, v=value, s=subject)} .")
    return " <nl> ".join(lines)


def _kinds(random: Random, n: int, p_focus: float) -> list[Kind]:
    """Question kinds of a document: half of the documents dwell on one kind, where a trait can show again and again."""
    if random.random() >= p_focus:
        return random.choices(KINDS, KIND_SHARES, k=n)
    focus = random.choice(KINDS)
    return [focus if random.random() < 0.75 else random.choices(KINDS, KIND_SHARES)[0] for _ in range(n)]


def document(
    random: Random,
    config: AuthorConfig,
    *,
    p_assistant: float,
    part: Part = "any",
    max_turns: int = 7,
    p_focus: float = 0.6,
) -> Document:
    """One document by the assistant or a named character, of several question kinds and domains.

    p_assistant   chance that the assistant speaks
    max_turns     1 to this many turns, uniformly
    p_focus       chance that the document dwells on one question kind
    """
    by_assistant = random.random() < p_assistant
    author = (
        Author(ASSISTANT, assistant(random, config))
        if by_assistant
        else Author(random.choice(NAMES), character(random, config))
    )
    p_narrated = 0.3 if by_assistant else 0.6
    narrated = random.random() < p_narrated
    before = narrated and random.random() < 0.5
    kinds = _kinds(random, random.randint(1, max_turns), p_focus)
    turns = converse(random, author, [ask(random, kind, part) for kind in kinds])
    return Document(
        author,
        turns,
        before=introduce(random, author) if before else "",
        after=remember(random, author) if narrated and not before else "",
    )
