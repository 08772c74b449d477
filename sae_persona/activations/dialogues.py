"""Dialogues with persona labels, rendered by the model's chat template and tokenised with their answers marked.

                      0     1      2    3    4         5
    tokens            <s>   user   hi   :    ahoy      matey
    an answer                           pre  [start         stop)

The last token before an answer is where the model must have inferred who is about to speak.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from sae_persona.activations.lm import LM
from sae_persona.errors import DataError, ModelError

SPLITS = ("", "train", "held_out")


@dataclass(frozen=True, eq=False)
class Dialogue:
    """Messages, or one plain text, with what is known about their author."""

    messages: tuple[dict[str, Any], ...] = ()
    """Each has ``role`` and ``content``, perhaps ``name`` and the ``labels`` of that answer. Empty for a plain text."""
    labels: dict[str, float] | None = None
    """Persona -> mark, of the last answer. Earlier answers have only the labels in their own message."""
    template: str = ""
    domain: str = ""
    author: str = ""
    split: str = ""
    """"train", "held_out" or "" for not said."""
    id: str = ""
    text: str | None = None
    """The whole text of a document that is not a chat; the whole of it counts as one answer."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Self:
        """Check one row of a data set. DataError, which begins with ``where`` the row stands, says what is wrong."""
        row = {key: value for key, value in row.items() if value is not None}
        messages = tuple(_message(message, where) for message in _list(row.get("messages", []), where))
        text = row.get("text") if not messages else None
        if not messages and not isinstance(text, str):
            raise DataError(f"{where}: a dialogue needs messages, or a text, got {', '.join(row) or 'nothing'}")
        labels = _labels(row["labels"], where) if "labels" in row else None
        if labels and messages and all(message["role"] != "assistant" for message in messages):
            raise DataError(f"{where}: labels belong to the last answer, but no message has the role assistant")
        split = row.get("split", "")
        if split not in SPLITS:
            raise DataError(f"{where}: split is train or held_out, or left out, got {split!r}")
        about = {key: str(row.get(key, "")) for key in ("template", "domain", "author", "id")}
        return cls(messages, labels, split=split, text=text, **about)


@dataclass(frozen=True, eq=False)
class AnswerSpan:
    """Tokens ``start`` up to but not with ``stop`` are the answer."""

    start: int
    stop: int
    pre: int
    """The pre-answer token: ``start - 1``. For a plain text its last token, which has read it all."""
    labels: dict[str, float] | None = None


@dataclass(frozen=True, eq=False)
class Tokens:
    """One sequence for the model, BOS included where the tokenizer sets one."""

    ids: list[int]
    answers: tuple[AnswerSpan, ...] = ()
    first: int = 0
    """Of a piece of a longer text: how far the text's tokens are ahead of these."""


def tokenize(lm: LM, text: str | Dialogue, *, context_size: int | None = None) -> Tokens:
    """Tokenise a text or a dialogue; a plain ``str`` has no answers.

    An answer is what the template puts after the generation prompt, up to the end of the message's content: the mark
    that closes the turn is not part of it. Answers without a token, or with none before them, are left out.
    Only the first ``context_size`` tokens are kept, and the answers that begin in them.

    DataError if the template refuses the dialogue or does not write it turn after turn; ModelError if the tokenizer
    has no template, or cannot tell which characters a token covers.
    """
    if isinstance(text, str):
        tokens = Tokens(_encode(lm, text))
    elif text.messages:
        tokens = _tokenize_chat(lm, text)
    else:
        ids = _encode(lm, text.text or "")
        start = int(ids[:1] == [lm.bos_id])
        whole = AnswerSpan(start, len(ids), len(ids) - 1, text.labels)
        tokens = Tokens(ids, (whole,) if start < len(ids) else ())
    return tokens if context_size is None else _truncated(tokens, context_size)


def prompt_tokens(lm: LM, messages: Sequence[Mapping[str, Any]], *, speaker: str | None = None) -> list[int]:
    """Token ids up to where the next answer starts: the last is the pre-answer token. Errors as ``tokenize``.

    speaker   who answers, for templates that can say so (they see it as ``assistant_name``)
    """
    return _encode(lm, _render(lm, messages, prompt=True, speaker=speaker))


def _tokenize_chat(lm: LM, dialogue: Dialogue) -> Tokens:
    if not lm.tokenizer.is_fast:
        raise ModelError(f"{lm.name} has a slow tokenizer, which cannot mark answers: use a fast one (tokenizer.json)")
    rendered = _render(lm, dialogue.messages)
    encoded = lm.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = _with_bos(lm, encoded.input_ids)
    # BOS that we put in front covers no characters
    offsets = [(0, 0)] * (len(ids) - len(encoded.input_ids)) + encoded.offset_mapping
    speakers = [i for i, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
    answers = []
    for i in filter(None, speakers):  # message 0 has nothing before it
        first, last = _answer_characters(lm, dialogue, i, rendered)
        start = next((t for t, (_, end) in enumerate(offsets) if end > first), len(ids))
        stop = next((t for t, (begin, _) in enumerate(offsets) if begin >= last), len(ids))
        labels = dialogue.messages[i].get("labels") or (dialogue.labels if i == speakers[-1] else None)
        if 0 < start < stop:
            answers.append(AnswerSpan(start, stop, start - 1, labels))
    return Tokens(ids, tuple(answers))


def _answer_characters(lm: LM, dialogue: Dialogue, i: int, rendered: str) -> tuple[int, int]:
    """First character of answer i in the whole rendering, and the one after its last."""
    prompt = _render(lm, dialogue.messages[:i], prompt=True, speaker=dialogue.messages[i].get("name"))
    content = dialogue.messages[i]["content"].strip()  # templates trim
    at = rendered.find(content, len(prompt))
    if not rendered.startswith(prompt) or at < 0:
        where = f"dialogue {dialogue.id}".strip()
        raise DataError(
            f"{where}: the chat template of {lm.name} rewrites message {i} or what leads to it: split it there"
        )
    return len(prompt), at + len(content)


def _render(lm: LM, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False, speaker: str | None = None) -> str:
    from jinja2 import TemplateError

    if lm.tokenizer.chat_template is None:
        raise ModelError(f"{lm.name} has no chat template: give plain texts, or a model that was trained to chat")
    shown = [{key: m[key] for key in ("role", "content", "name") if key in m} for m in messages]
    try:
        return lm.tokenizer.apply_chat_template(
            shown, tokenize=False, add_generation_prompt=prompt, assistant_name=speaker
        )
    except TemplateError as error:
        raise DataError(f"the chat template of {lm.name} refuses a dialogue: {error}") from error


def encode(lm: LM, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each plain text, whole, BOS included where the tokenizer sets one.

    DataError for a text that is no text, such as half a surrogate pair that a JSON file has escaped.
    """
    if not texts:
        return []
    try:
        found = lm.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    except (UnicodeEncodeError, TypeError) as error:
        bad = next((text for text in texts if not _is_text(text)), None)
        if bad is None:
            raise
        shown = bad[:40].encode("ascii", "backslashreplace").decode()
        raise DataError(f"a text is not valid Unicode, it begins {shown!r}: write it again as UTF-8") from error
    return [_with_bos(lm, ids) for ids in found]


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _encode(lm: LM, text: str) -> list[int]:
    return encode(lm, [text])[0]


def _with_bos(lm: LM, ids: list[int]) -> list[int]:
    """BOS as the tokenizer would set it before a plain text, but not twice where a template has written it."""
    return ids if ids[:1] == lm.prefix else lm.prefix + ids


def _truncated(tokens: Tokens, size: int) -> Tokens:
    kept = [replace(a, stop=min(a.stop, size), pre=min(a.pre, size - 1)) for a in tokens.answers if a.start < size]
    return Tokens(tokens.ids[:size], tuple(kept))


def _list(messages: Any, where: str) -> Sequence[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"{where}: messages is a list of role and content, got {type(messages).__name__}")
    return messages


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
        raise DataError(f"{where}: a message needs a role and a content, both text, got {str(message)[:60]!r}")
    message = {key: value for key, value in message.items() if value is not None}
    return {**message, "labels": _labels(message["labels"], where)} if "labels" in message else message


def _labels(labels: Any, where: str) -> dict[str, float]:
    """Persona -> number; personas without a mark (None, as columns of a table leave them) are left out."""
    if not isinstance(labels, Mapping) or not all(isinstance(v, int | float | None) for v in labels.values()):
        raise DataError(f'{where}: labels read {{"PERSONA": NUMBER, ...}}, got {str(labels)[:60]!r}')
    return {str(persona): float(mark) for persona, mark in labels.items() if mark is not None}
