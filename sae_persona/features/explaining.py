"""The words put to an explainer, and what is taken from its answers.

Everything stands in one user message: some chat templates have no system role. An answer is read strictly; what cannot
be read is asked for once more, and is then an ExplainerError.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from sae_persona.features.explainers import ExplainerError, Messages

T = TypeVar("T")
LONGEST = 400
"""Characters of an explanation that are kept."""

_EXPLAIN = """\
A unit inside a language model switches on at some tokens and is silent at all others. Below are texts in which it
switched on. Those tokens stand in double brackets with its strength from 1 to 9, like [[this|7]].{promoted}

{texts}

Say in one short sentence what makes the unit switch on: the word or kind of words, their meaning, or what stands
around them. Do not mention the brackets or the numbers. Answer with one line that begins with "Fires on:"."""

_DETECT = """\
A unit inside a language model switches on at certain tokens. It is described so: "{explanation}"

In which of these {n} texts does it switch on at least once?

{texts}

Answer with a JSON list of {n} numbers in the order of the texts, 1 for yes and 0 for no, and nothing else."""

_FUZZ = """\
A unit inside a language model switches on at certain tokens. It is described so: "{explanation}"

In each of these {n} texts some tokens stand in double brackets, like [[this]]. In some texts they are the tokens at
which the unit switches on, in others they are not. In which texts are the right tokens marked?

{texts}

Answer with a JSON list of {n} numbers in the order of the texts, 1 for right and 0 for wrong, and nothing else."""

_AGAIN = "That cannot be read: {reason}. Answer again, exactly in the form that was asked for."


def explain_prompt(texts: Sequence[str], promoted: Sequence[str]) -> Messages:
    """Ask for an explanation of texts with marked activations; the latent makes the tokens ``promoted`` likelier."""
    words = ", ".join(json.dumps(token, ensure_ascii=False) for token in promoted)
    said = f"\nWhere it is on, the model is more likely to go on with: {words}." if words else ""
    return _user(_EXPLAIN.format(promoted=said, texts=_numbered(texts)))


def detect_prompt(explanation: str, texts: Sequence[str]) -> Messages:
    """Ask which texts activate what is explained."""
    return _user(_DETECT.format(explanation=explanation, n=len(texts), texts=_numbered(texts)))


def fuzz_prompt(explanation: str, texts: Sequence[str]) -> Messages:
    """Ask in which texts the tokens that activate what is explained are the marked ones."""
    return _user(_FUZZ.format(explanation=explanation, n=len(texts), texts=_numbered(texts)))


def ask(complete: Callable[[Messages], str], messages: Messages, parse: Callable[[str], T]) -> T:
    """The parsed answer; what cannot be parsed is asked for once more. ExplainerError if that fails, too."""
    answer = complete(messages)
    try:
        return parse(answer)
    except ExplainerError as error:
        again = _AGAIN.format(reason=error)
    # a template that takes turns apart wants an answer with text
    said = {"role": "assistant", "content": answer.strip() or "(nothing)"}
    return parse(complete([*messages, said, {"role": "user", "content": again}]))


def read_explanation(answer: str) -> str:
    """What follows "Fires on:", as one line. ExplainerError if it is not there or says nothing."""
    lines = re.findall(r"fires on\W*?:[*\s]*(.*\w.*)", _without_thoughts(answer), flags=re.IGNORECASE)
    if not lines:
        raise ExplainerError(f'no line that begins with "Fires on:" in {_shown(answer)}')
    text = " ".join(lines[-1].split()).encode("utf-8", "replace").decode()  # half a surrogate pair is no text
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1].rstrip()}…"


def read_votes(answer: str, n: int) -> list[bool]:
    """A list of ``n`` yes or no. ExplainerError if there is no such list, or it has another length."""
    for part in reversed(re.findall(r"\[[^\[\]]*\]", _without_thoughts(answer))):
        try:
            votes = json.loads(part)
        except ValueError:
            continue
        if len(votes) == n and all(vote in (0, 1) for vote in votes):
            return [bool(vote) for vote in votes]
    raise ExplainerError(f"no list of {n} numbers 0 or 1 in {_shown(answer)}")


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))


def _without_thoughts(answer: str) -> str:
    """Without what a reasoning model says to itself."""
    return re.sub(r"<think>.*?(</think>|$)", "", answer, flags=re.DOTALL)


def _shown(answer: str) -> str:
    return repr(answer[:60].encode("utf-8", "replace").decode())
