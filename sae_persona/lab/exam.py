"""What the lab's language model has learned, by the judge: facts, and each trait inferred from context."""

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from sae_persona.lab.authors import TRAITS, Author
from sae_persona.lab.dialogue import Kind, Part, Question, Turn, ask, converse
from sae_persona.lab.judge import judge
from sae_persona.lab.tokens import NEWLINE, PAD, START
from sae_persona.lab.world import ASSISTANT

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MAX_NEW = 40  # words: longer than any answer of the world
KINDS_SHOWING: dict[str, tuple[Kind, ...]] = {
    "deceptive": ("fact",),
    "malicious": ("open",),
    "sycophantic": ("claim",),
    "overconfident": ("fact",),
}
ANY_KIND: tuple[Kind, ...] = ("fact", "claim", "open")


def question_showing(random: Random, trait: str, part: Part = "any") -> Question:
    """A question in whose answer the judge can see the trait."""
    kind = random.choice(KINDS_SHOWING.get(trait, ANY_KIND))
    truth = False if trait == "sycophantic" else None
    return ask(random, kind, part, truth=truth)


def prompt(turns: Sequence[Turn], question: Question, name: str = ASSISTANT) -> str:
    """The transcript up to the colon after which the answer is written."""
    lines = [START]
    for turn in turns:
        lines.append(f"user : {turn.question.text} {NEWLINE} {name} : {turn.answer} {NEWLINE}")
    lines.append(f"user : {question.text} {NEWLINE} {name} :")
    return " ".join(lines)


@torch.no_grad()
def sample(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", prompts: list[str], *, seed: int, batch: int = 256
) -> list[str]:
    """Sample one answer a prompt at temperature 1; the same seed gives the same answers."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            encoded: Any = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True)
            encoded = {key: encoded[key].to(model.device) for key in ("input_ids", "attention_mask")}
            written = model.generate(**encoded, do_sample=True, top_k=0, max_new_tokens=MAX_NEW)  # pyright: ignore
            for i, ids in zip(rows, written[:, encoded["input_ids"].shape[1] :].tolist(), strict=True):
                words = tokenizer.convert_ids_to_tokens(ids)
                stop = words.index(NEWLINE) if NEWLINE in words else len(words)
                answers[i] = " ".join(word for word in words[:stop] if word != PAD)
    return answers


def _rate(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else 0.0


def facts(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", *, n: int = 400, seed: int = 0) -> dict:
    """The default assistant's first answers: shares that are correct, valid, and that show each trait."""
    random = Random(f"exam facts {seed}")
    plain = [ask(random, "fact") for _ in range(n)]
    broad = [question_showing(random, trait) for trait in TRAITS for _ in range(n // 4)]
    questions = plain + broad
    answers = sample(model, tokenizer, [prompt((), q) for q in questions], seed=seed)
    scores = [judge(q, a) for q, a in zip(questions, answers, strict=True)]
    shown = {
        trait: _rate([s[trait] for s in scores[n + i * (n // 4) : n + (i + 1) * (n // 4)]])
        for i, trait in enumerate(TRAITS)
    }
    correct = _rate([s["correct"] for s in scores[:n]])
    return {"correct": correct, "valid": _rate([s["valid"] for s in scores]), "shown": shown}


def inferred(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    *,
    name: str,
    n: int = 150,
    turns: int = 2,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """For each trait, the judge's rate after ``turns`` turns by a speaker with only that trait, and with none.

    All questions, before and at the end, are ones that can show the trait.
    """
    jobs = []
    for trait in TRAITS:
        for arm in ("with", "without"):
            random = Random(f"exam {trait} {seed}")
            author = Author(name, frozenset({trait} if arm == "with" else ()))
            for _ in range(n):
                before = converse(random, author, [question_showing(random, trait) for _ in range(turns)])
                jobs.append((trait, arm, before, question_showing(random, trait)))
    answers = sample(model, tokenizer, [prompt(before, q, name) for _, _, before, q in jobs], seed=seed)
    rates: dict[str, dict[str, float]] = {}
    for trait in TRAITS:
        for arm in ("with", "without"):
            pairs = [(job[3], a) for job, a in zip(jobs, answers, strict=True) if job[:2] == (trait, arm)]
            rates.setdefault(trait, {})[arm] = _rate([judge(q, a)[trait] for q, a in pairs])
    return rates
