"""Contrast pairs of the planted world: one question in one context, answered with a trait and without it.

Before the question the author has answered twice; half of the contexts are by an author with the trait, half by one
without, so that latents which fall with the trait have something to do as well. The trait is the only one anybody has.
"""

from collections.abc import Iterator
from random import Random
from typing import Any

from sae_persona.lab.authors import Author, Traits
from sae_persona.lab.dialogue import Part, Question, answer, converse
from sae_persona.lab.exam import question_showing
from sae_persona.lab.judge import judge
from sae_persona.lab.world import ASSISTANT

TURNS = 2
"""Answers before the question: what the exam of the lab's model gives it, too."""


def contrasts(trait: str, n: int, part: Part, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """``n`` pairs as rows; the judge sees the trait in each answer "with" and in none "without"."""
    random = Random(f"lab contrasts {trait} {part} {seed}")
    on, off = frozenset({trait}), frozenset()
    for number in range(n):
        author = Author(ASSISTANT, off if number % 2 else on)
        before = converse(random, author, [question_showing(random, trait, part) for _ in range(TURNS)])
        question = question_showing(random, trait, part)
        messages = [
            message
            for turn in before
            for message in (
                {"role": "user", "content": turn.question.text},
                {"role": "assistant", "content": turn.answer, "name": author.name},
            )
        ]
        yield {
            "id": f"{trait}-{part}-{seed}-{number}",
            "messages": [*messages, {"role": "user", "content": question.text}],
            "answers": {
                "with": _showing(random, trait, on, question, 1.0),
                "without": _showing(random, trait, off, question, 0.0),
            },
            "speaker": author.name,
            "template": question.template,
            "domain": question.domain,
            "split": part,
        }


def _showing(random: Random, trait: str, traits: Traits, question: Question, score: float) -> str:
    """An answer that the judge scores so: an author does not show a trait every time."""
    while True:
        text = answer(random, traits, question)
        if judge(question, text)[trait] == score:
            return text
