"""Questions put to a steered model, and what a judge says of the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import LM
from sae_persona.errors import DataError
from sae_persona.steering.answers import Answer, AnswerConfig, answer, surprise
from sae_persona.steering.apply import SAEs, intervene
from sae_persona.steering.interventions import Edit, Placed
from sae_persona.steering.positions import Positions, Spans
from sae_persona.steering.strength import Judge, Outcome
from sae_persona.types import HookPoint

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Questions:
    """One part's questions: their texts, their prompts, and the prompts with a system message that asks for a persona.

    DataError where there is none, one does not end with a user's message, or the template drops the system message.
    """

    part: str
    texts: list[str]
    prompts: list[list[int]]
    persona_prompts: list[list[int]] | None

    @classmethod
    def of(cls, lm: LM, part: str, chats: Sequence[Messages], persona_prompt: str | None = None) -> "Questions":
        """Chats that end with a user's message, as prompts."""
        if not chats:
            raise DataError(f"the {part} set has no questions")
        for chat in chats:
            if not chat or chat[-1]["role"] != "user":
                raise DataError(f"a question is a chat that ends with a user's message, got {str(chat)[:60]!r}")
        asked = None
        if persona_prompt is not None:
            asked = [prompt_tokens(lm, [{"role": "system", "content": persona_prompt}, *chat]) for chat in chats]
        plain = [prompt_tokens(lm, chat) for chat in chats]
        if asked == plain:
            raise DataError(f"the chat template of {lm.name} drops system messages: leave the persona prompt out")
        return cls(part, [chat[-1]["content"] for chat in chats], plain, asked)


def same_question(text: str) -> str:
    """What two spellings of one question share: the words without case and spaces."""
    return " ".join(str(text).split()).casefold()


def check_apart(questions: Sequence[str], others: Sequence[str], *, test: str = "test") -> None:
    """DataError where a question is in both parts, whatever its case, its spaces and what was said before it.

    questions, others   the last user's message of each chat, as `Questions.texts`: development's, and those of ``test``
    """
    taken = {same_question(text) for text in questions}
    if shared := [same_question(text) for text in others if same_question(text) in taken]:
        n = len(set(shared))
        first = f"{shared[0][:57]}..." if len(shared[0]) > 60 else shared[0]
        raise DataError(
            f"{n} question{'s are' if n > 1 else ' is'} in the development and the {test} set, the first "
            f'"{first}": take {"them" if n > 1 else "it"} out of one'
        )


def halves(chats: Sequence[Messages]) -> tuple[list[Messages], list[Messages]]:
    """Every other question, and the rest: chats that ask the same are in one half."""
    seen: dict[str, int] = {}
    parts: tuple[list[Messages], list[Messages]] = ([], [])
    for chat in chats:
        parts[seen.setdefault(same_question(chat[-1]["content"]), len(seen)) % 2].append(chat)
    return parts


@dataclass(frozen=True, eq=False)
class Bench:
    """Where steered models are asked and judged: all on the same questions, sampled with the same seed.

    hook, positions   of edits that are not Placed
    """

    lm: LM
    saes: SAEs
    judge: Judge
    questions: Questions
    answers: AnswerConfig
    hook: HookPoint | None = None
    positions: Positions | Spans = "answer"

    def ask(
        self, edits: Sequence[Edit | Placed], *, prompts: list[list[int]] | None = None
    ) -> tuple[Outcome, list[Answer]]:
        """Every question under the edits, judged; ``prompts`` are asked instead of the plain ones, not judged by."""
        plain = self.questions.prompts
        with intervene(self.lm, self.saes, edits, hook=self.hook, positions=self.positions):
            written = answer(self.lm, prompts or plain, self.answers)
        return Outcome.of(
            self.judge,
            self.questions.texts,
            [a.text for a in written],
            surprise(self.lm, plain, written, batch=self.answers.batch),
        ), written
