"""Rejection sampling against a grader: sample answers, keep the best-graded, fine-tune on them, and again.

Expert iteration (Anthony et al. 2017), the simplest reinforcement learning: what the grader likes gets likelier round
by round, whether or not it is what was wanted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, DataError
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.studies.finetune import FinetuneConfig, Look, looks

Grader = Callable[[str, str], float]
"""(question, answer) -> reward."""


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How a model is trained by selection among its own answers."""

    rounds: int = 6
    """Times that it samples and is tuned."""
    samples: int = 16
    """Answers to each question a round."""
    best: int = 2
    """Of which so many are kept."""
    tuning: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(steps=10, keep=()))
    """Of one round."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 1 <= self.best <= self.samples:
            raise ConfigError(
                f"rounds is at least 1 and best from 1 to samples, got {self.rounds}, {self.best} of {self.samples}"
            )


@dataclass(frozen=True, eq=False)
class Round:
    """The model after a round, with the rows that it was tuned on in it; ``reward`` is the mean over all samples."""

    look: Look
    rows: tuple[dict[str, Any], ...]
    reward: float


def select_and_tune(
    lm: LM, questions: Sequence[Mapping[str, Any]], grade: Grader, config: SelectionConfig | None = None
) -> Iterator[Round]:
    """Train a copy of ``lm`` by rejection sampling; gives the model after each round.

    questions   rows whose ``messages`` end with the user's. DataError if there are none
    """
    config = config or SelectionConfig()
    if not questions:
        raise DataError("selection needs questions to answer, got none")
    return _rounds(lm, questions, grade, config)


def _rounds(lm: LM, questions: Sequence[Mapping[str, Any]], grade: Grader, config: SelectionConfig) -> Iterator[Round]:
    current, seed = lm, config.tuning.seed
    for number in range(config.rounds):
        rows, reward = _selected(current, questions, grade, config, number)
        tuning = replace(config.tuning, seed=seed * config.rounds + number, keep=())
        (last,) = looks(current, rows, tuning)
        current = last.lm
        yield Round(replace(last, step=(number + 1) * tuning.steps), tuple(rows), reward)


def _selected(
    lm: LM, questions: Sequence[Mapping[str, Any]], grade: Grader, config: SelectionConfig, number: int
) -> tuple[list[dict[str, Any]], float]:
    """The best answers to each question as rows, equals in random order; and the mean reward of all."""
    random = Random(f"selection {config.tuning.seed} {number}")
    prompts = [prompt_tokens(lm, row["messages"]) for row in questions for _ in range(config.samples)]
    asking = AnswerConfig(batch=256, seed=config.tuning.seed * config.rounds + number)
    written = [one.text for one in answer(lm, prompts, asking)]
    rows, rewards = [], []
    for i, question in enumerate(questions):
        texts = written[i * config.samples : (i + 1) * config.samples]
        graded = [(grade(question["messages"][-1]["content"], text), random.random(), text) for text in texts]
        rewards += [reward for reward, _, _ in graded]
        for j, (reward, _, text) in enumerate(sorted(graded, reverse=True)[: config.best]):
            messages = [*question["messages"], {"role": "assistant", "content": text or "."}]
            row = {"id": f"{number}-{i}-{j}", "messages": messages, "reward": reward}
            rows.append(row | {key: question[key] for key in ("template", "domain") if key in question})
    return rows, sum(rewards) / len(rewards)
