"""Explain latents in words, and score each explanation on texts that it was not written from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np

from sae_persona.errors import ConfigError
from sae_persona.features.answer_log import AnswerLog, answer_key
from sae_persona.features.contexts import Context
from sae_persona.features.descriptions import Description
from sae_persona.features.explainers import Explainer, ExplainerError, Messages
from sae_persona.features.explaining import (
    ask,
    detect_prompt,
    explain_prompt,
    fuzz_prompt,
    read_explanation,
    read_votes,
)
from sae_persona.features.samples import Item, SilentTexts, plain, split, with_activations, with_marks

PLACEHOLDER = "words of some kind, which stand in for an explanation that has not been written yet, in a dry run"


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """How latents are explained and the explanations scored."""

    scores: bool = True
    """Score each explanation by detection and fuzzing on held-out contexts."""
    min_contexts: int = 4
    """Contexts that a latent needs to be explained; half of them are held out."""
    texts_per_request: int = 10
    """Texts that are judged in one request."""
    concurrency: int = 4
    """Latents that are explained at a time."""
    give_up: int = 20
    """Requests in a row without an answer after which the explainer is asked no more."""
    seed: int = 0
    """Of the texts that do not activate a latent, and of wrong marks."""

    def __post_init__(self) -> None:
        if min(self.texts_per_request, self.concurrency, self.give_up) < 1 or self.min_contexts < 2:
            raise ConfigError(
                "texts_per_request, concurrency and give_up are at least 1 and min_contexts at least 2, got "
                f"{self.texts_per_request}, {self.concurrency}, {self.give_up}, {self.min_contexts}"
            )


@dataclass(frozen=True)
class Subject:
    """What is known of a latent before it is explained: its description so far and its contexts, strongest first."""

    description: Description
    contexts: Sequence[Context]


@dataclass(frozen=True)
class Plan:
    """What explaining would take. Tokens are estimated at four characters each."""

    latents: int
    skipped: int
    """Latents with too few contexts."""
    requests: int
    answered: int
    """Of the requests: those that the log can answer already."""
    prompt_tokens: int
    answer_tokens: int
    """At most."""

    def __str__(self) -> str:
        return (
            f"{self.latents} latents to explain, {self.skipped} with too few contexts; {self.requests} requests, "
            f"{self.answered} of them answered before at least; about {self.prompt_tokens} tokens to read and at most "
            f"{self.answer_tokens} to write"
        )


class _Questions:
    """The texts put to an explainer about one latent: the same for the same seed, whoever asks."""

    def __init__(self, tokenizer: Any, subject: Subject, silent: SilentTexts | None, config: ExplainConfig) -> None:
        self.latent = subject.description.latent
        self.config, self._tokenizer = config, tokenizer
        shown, self._held_out = split(subject.contexts)
        strongest = max(context.strength for context in shown)
        texts = [with_activations(tokenizer, context, strongest) for context in shown]
        self.explain = explain_prompt(texts, [token for token, _ in subject.description.promoted])
        self._silent = silent.of(self.latent, self._held_out, self._rng(0)) if silent else []

    def detection(self) -> list[list[Item]]:
        """Held-out contexts and as many texts on which the latent is silent, shuffled, a list a request."""
        items = [Item(plain(self._tokenizer, context.tokens), True) for context in self._held_out]
        items += [Item(plain(self._tokenizer, tokens), False) for tokens in self._silent]
        return self._requests(items, self._rng(1)) if self._silent else []

    def fuzzing(self) -> list[list[Item]]:
        """Each held-out context once with right and once with wrong marks, never both in one request."""
        halves: tuple[list[Item], list[Item]] = [], []
        rng = self._rng(2)
        for i, context in enumerate(self._held_out):
            texts = [with_marks(self._tokenizer, context, rng, right=right) for right in (True, False)]
            if texts[1] is None:
                continue
            halves[i % 2].append(Item(str(texts[0]), True))
            halves[1 - i % 2].append(Item(str(texts[1]), False))
        return [request for half in halves for request in self._requests(half, rng)]

    def _requests(self, items: list[Item], rng: np.random.Generator) -> list[list[Item]]:
        order, size = [items[i] for i in rng.permutation(len(items))], self.config.texts_per_request
        return [order[at : at + size] for at in range(0, len(order), size)]

    def _rng(self, part: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.latent, part])


def explain(
    explainer: Explainer,
    tokenizer: Any,
    subjects: Sequence[Subject],
    silent: SilentTexts | None,
    log: AnswerLog,
    config: ExplainConfig | None = None,
    *,
    on_done: Callable[[Description], object] | None = None,
) -> list[Description]:
    """The descriptions with explanations, in order. What goes wrong with one latent is its ``error``; the others go on.

    silent    where texts that do not activate a latent come from; without, there is no detection score
    on_done   told of each as it is ready, in any order

    RunError if the log cannot be written.
    """
    config = config or ExplainConfig()
    worker = _Worker(explainer, tokenizer, silent, log, config)
    done: dict[int, Description] = {}
    pool = ThreadPoolExecutor(config.concurrency)
    try:
        futures = {pool.submit(worker.explained, subject): i for i, subject in enumerate(subjects)}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            if on_done:
                on_done(done[futures[future]])
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt: what is being asked ends, the rest is not begun
    return [done[i] for i in range(len(subjects))]


class _Worker:
    """Explains one latent after another, from several threads; counts failures in a row."""

    def __init__(
        self, explainer: Explainer, tokenizer: Any, silent: SilentTexts | None, log: AnswerLog, config: ExplainConfig
    ) -> None:
        self.explainer, self.tokenizer, self.silent, self.log, self.config = explainer, tokenizer, silent, log, config
        self._lock, self._failures = Lock(), 0

    def explained(self, subject: Subject) -> Description:
        blank = replace(subject.description, explainer=self.explainer.name)
        if too_few(subject, self.config):
            return replace(blank, error=f"{len(subject.contexts)} contexts, {self.config.min_contexts} are needed")
        if self._failures >= self.config.give_up:
            return replace(blank, error=f"not asked: {self._failures} requests before got no answer")
        questions = _Questions(self.tokenizer, subject, self.silent, self.config)
        try:
            explanation = ask(self._complete, questions.explain, read_explanation)
        except ExplainerError as error:
            return replace(blank, error=str(error))
        found, errors = replace(blank, explanation=explanation), []
        if self.config.scores:
            for name, prompt, requests in (
                ("detection", detect_prompt, questions.detection()),
                ("fuzzing", fuzz_prompt, questions.fuzzing()),
            ):
                try:
                    found = replace(found, **{name: self._score(prompt, explanation, requests)})
                except ExplainerError as error:
                    errors.append(f"{name}: {error}")
        return replace(found, error="; ".join(errors) or None)

    def _score(self, prompt: Callable[[str, Sequence[str]], Messages], explanation: str, requests: list) -> float:
        truths: list[bool] = []
        votes: list[bool] = []
        for items in requests:
            n = len(items)
            asked = prompt(explanation, [item.text for item in items])
            votes += ask(self._complete, asked, lambda answer, n=n: read_votes(answer, n))
            truths += [item.truth for item in items]
        if len(set(truths)) < 2:
            raise ExplainerError("no texts of both kinds: the latent fires everywhere in those that there are")
        return balanced_accuracy(truths, votes)

    def _complete(self, messages: Messages) -> str:
        """From the log, or asked; every failure to answer counts, every answer sets the count to 0."""
        try:
            answer = self.log.complete(self.explainer, messages)
        except ExplainerError:
            with self._lock:
                self._failures += 1
            raise
        with self._lock:
            self._failures = 0
        return answer


def too_few(subject: Subject, config: ExplainConfig) -> bool:
    """Whether the latent has fewer contexts than explaining needs."""
    return len(subject.contexts) < config.min_contexts


def balanced_accuracy(truths: Iterable[bool], votes: Iterable[bool]) -> float:
    """Mean of the shares of true and of false items that were told right: 0.5 for any constant answer."""
    right: Mapping[bool, list[bool]] = {True: [], False: []}
    for truth, vote in zip(truths, votes, strict=True):
        right[truth].append(vote == truth)
    return float(np.mean([np.mean(right[True]), np.mean(right[False])]))


def plan(
    name: str,
    tokenizer: Any,
    subjects: Sequence[Subject],
    silent: SilentTexts | None,
    log: AnswerLog,
    config: ExplainConfig | None = None,
    *,
    answer_tokens: int,
) -> Plan:
    """Count what `explain` would ask the explainer of that name; explanations not written yet are of usual length."""
    config = config or ExplainConfig()
    prompts: list[Messages] = []
    for subject in subjects:
        if too_few(subject, config):
            continue
        questions = _Questions(tokenizer, subject, silent, config)
        prompts.append(questions.explain)
        if config.scores:
            for prompt, requests in ((detect_prompt, questions.detection()), (fuzz_prompt, questions.fuzzing())):
                prompts += [prompt(PLACEHOLDER, [item.text for item in items]) for items in requests]
    return Plan(
        latents=sum(not too_few(subject, config) for subject in subjects),
        skipped=sum(too_few(subject, config) for subject in subjects),
        requests=len(prompts),
        answered=sum(answer_key(name, messages) in log for messages in prompts),
        prompt_tokens=sum(len(message["content"]) for messages in prompts for message in messages) // 4,
        answer_tokens=len(prompts) * answer_tokens,
    )
