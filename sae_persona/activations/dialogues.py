"""Dialogues with persona labels, rendered by the model's chat template and tokenised with their answers marked.

                      0     1      2    3    4         5
    tokens            <s>   user   hi   :    ahoy      matey
    an answer                           pre  [start         stop)

The last token before an answer is where the model must have inferred who is about to speak. A labelled span of an
answer is marked likewise: its own tokens, and the one before them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from typing import Any, Self

from sae_persona.activations.lm import LM
from sae_persona.activations.rows import Mark, Span, read_covariates, read_flag, read_marks, read_messages, read_spans
from sae_persona.errors import DataError, ModelError

SPLITS = ("", "train", "held_out")


@dataclass(frozen=True, eq=False)
class Dialogue:
    """Messages, or one plain text, with what is known about their author."""

    messages: tuple[dict[str, Any], ...] = ()
    """Each has ``role`` and ``content``, perhaps ``name``; an answer perhaps ``labels``, ``weights``, ``hard`` and
    ``spans`` of its own. Empty for a plain text."""
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
    weights: dict[str, float] | None = None
    """Persona -> confidence in its label, from 0 to 1; 1 where not said."""
    spans: tuple[Span, ...] = ()
    """Labelled spans of a plain text; those of an answer stand in its message."""
    hard: bool = False
    """A hard negative: it looks like the persona, by its words for instance, and is not."""
    covariates: dict[str, float] | None = None
    """What else is known and may explain a latent, by name."""
    unanswered: bool = False
    """The labels are of the answer that the last message asks for: it is read at the token before it alone."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Self:
        """Check one row of a data set. DataError, which begins with ``where`` the row stands, says what is wrong."""
        row = {key: value for key, value in row.items() if value is not None}
        messages = read_messages(row.get("messages", []), where)
        text: Any = row.get("text") if not messages else None
        if not messages and not isinstance(text, str):
            raise DataError(f"{where}: a dialogue needs messages, or a text, got {', '.join(row) or 'nothing'}")
        found = read_marks(row, where)
        unanswered = read_flag(row.get("unanswered", False), "unanswered", where)
        if unanswered and (not messages or messages[-1]["role"] == "assistant"):
            raise DataError(f"{where}: unanswered needs messages, the last of them not by the assistant")
        if found.get("labels") and messages and not unanswered and not _answers(messages):
            raise DataError(f"{where}: labels belong to the last answer, but no message has the role assistant")
        if row.get("spans") and messages:
            raise DataError(f"{where}: spans of an answer stand in its message, beside its content")
        split = row.get("split", "")
        if split not in SPLITS:
            raise DataError(f"{where}: split is train or held_out, or left out, got {split!r}")
        about = {key: str(row.get(key, "")) for key in ("template", "domain", "author", "id")}
        if "covariates" in row:
            found["covariates"] = read_covariates(row["covariates"], where)
        if row.get("spans"):
            found["spans"] = read_spans(row["spans"], text, where)
        return cls(messages, split=split, text=text, unanswered=unanswered, **about, **found)

    def to_row(self) -> dict[str, Any]:
        """The row that ``from_row`` reads it from, as JSON values; what is not said is left out."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        row["messages"] = [message | _plain_spans(message.get("spans")) for message in self.messages]
        row["spans"] = _plain_spans(self.spans).get("spans")
        unsaid = {name for name, value in row.items() if value is None or (name != "text" and value in ("", [], False))}
        return {name: value for name, value in row.items() if name not in unsaid}

    def marks(self) -> Iterator[Mark]:
        """Every answer in turn, each followed by its labelled spans; labelled or not."""
        own: dict[str, Any] = {"labels": self.labels, "weights": self.weights}
        if not self.messages:
            yield from _marks(self.text or "", own, self.spans, self.hard)
            return
        speakers = _answers(self.messages)
        for number, i in enumerate(speakers):
            message = self.messages[i]
            last = i == speakers[-1] and not self.unanswered and not message.get("labels")
            given = own if last else {"labels": message.get("labels"), "weights": message.get("weights")}
            hard = message.get("hard", self.hard)
            yield from _marks(message["content"], given, message.get("spans", ()), hard, answer=number, message=i)
        if self.unanswered:
            yield Mark("", answer=len(speakers), message=len(self.messages), hard=self.hard, **own)


def default_split(name: str) -> str:
    """The split of a dialogue that says none, by its id: half and half, the same one every time."""
    return "held_out" if sha256(name.encode("utf-8", "surrogatepass")).digest()[0] % 2 else "train"


def _plain_spans(spans: Sequence[Span] | None) -> dict[str, Any]:
    return {"spans": [{k: v for k, v in asdict(span).items() if v is not None} for span in spans]} if spans else {}


def _answers(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _marks(text: str, own: dict[str, Any], spans: Sequence[Span], hard: bool, **place: Any) -> Iterator[Mark]:
    yield Mark(text, hard=hard, **own, **place)
    for span in spans:
        at = (span.start, span.stop)
        yield Mark(text[slice(*at)], span=at, labels=span.labels, weights=span.weights, hard=span.hard or hard, **place)


@dataclass(frozen=True, eq=False)
class AnswerSpan:
    """Tokens ``start`` up to but not with ``stop`` are the answer, or the span of it that is marked.

    Of an answer that is awaited they are the token before it.
    """

    start: int
    stop: int
    pre: int
    """The token before: ``start - 1``. For a whole plain text its last token, which has read it all."""
    mark: Mark

    @property
    def labels(self) -> dict[str, float] | None:
        """Persona -> mark."""
        return self.mark.labels


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
    that closes the turn is not part of it. A span is every token that covers one of its characters. Answers and spans
    without a token, or with none before them, are left out.
    Only the first ``context_size`` tokens are kept, and the answers that begin in them.

    DataError if the template refuses the dialogue or does not write it turn after turn; ModelError if the tokenizer
    has no template, or cannot tell which characters a token covers.
    """
    if isinstance(text, str):
        tokens = Tokens(_encode(lm, text))
    elif text.messages:
        tokens = _tokenize_chat(lm, text)
    else:
        tokens = _tokenize_plain(lm, text)
    return tokens if context_size is None else _truncated(tokens, context_size)


def prompt_tokens(lm: LM, messages: Sequence[Mapping[str, Any]], *, speaker: str | None = None) -> list[int]:
    """Token ids up to where the next answer starts: the last is the pre-answer token. Errors as ``tokenize``.

    speaker   who answers, for templates that can say so (they see it as ``assistant_name``)
    """
    return _encode(lm, _render(lm, messages, prompt=True, speaker=speaker))


def _tokenize_plain(lm: LM, dialogue: Dialogue) -> Tokens:
    """The whole text is an answer that is read at its end; a span has the token before it."""
    text = dialogue.text or ""
    whole, *spans = dialogue.marks()
    if spans:
        ids, offsets = _encode_with_offsets(lm, text)
    else:
        ids, offsets = _encode(lm, text), []
    start = int(ids[:1] == [lm.bos_id])
    answers = [AnswerSpan(start, len(ids), len(ids) - 1, whole)] if start < len(ids) else []
    for mark in spans:
        first, stop = _covering(offsets, *(mark.span or (0, 0)))
        if start < first < stop:  # BOS has read nothing
            answers.append(AnswerSpan(first, stop, first - 1, mark))
    return Tokens(ids, tuple(answers))


def _tokenize_chat(lm: LM, dialogue: Dialogue) -> Tokens:
    _check_fast(lm)
    rendered = _render(lm, dialogue.messages, prompt=dialogue.unanswered)
    ids, offsets = _encode_with_offsets(lm, rendered)
    places: dict[int, tuple[int, int, int]] = {}
    answers = []
    for mark in dialogue.marks():
        i = mark.message
        if not i:  # message 0 has nothing before it
            continue
        if i == len(dialogue.messages):
            answers.append(AnswerSpan(len(ids) - 1, len(ids), len(ids) - 1, mark))
            continue
        if i not in places:
            places[i] = _answer_characters(lm, dialogue, i, rendered)
        first, at, last = places[i]
        if mark.span is not None:
            content = dialogue.messages[i]["content"]
            trimmed = len(content) - len(content.lstrip())
            first, last = (min(at + max(character - trimmed, 0), last) for character in mark.span)
        start, stop = _covering(offsets, first, last)
        if first < last and 0 < start < stop:
            answers.append(AnswerSpan(start, stop, start - 1, mark))
    return Tokens(ids, tuple(answers))


def _check_fast(lm: LM) -> None:
    if not lm.tokenizer.is_fast:
        raise ModelError(f"{lm.name} has a slow tokenizer, which cannot mark answers: use a fast one (tokenizer.json)")


def _encode_with_offsets(lm: LM, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids with BOS, and the characters that each covers."""
    _check_fast(lm)
    try:
        encoded = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except (UnicodeEncodeError, TypeError) as error:
        raise _not_unicode([text]) or error from error
    ids = _with_bos(lm, encoded.input_ids)
    # BOS that we put in front covers no characters
    return ids, [(0, 0)] * (len(ids) - len(encoded.input_ids)) + encoded.offset_mapping


def _covering(offsets: Sequence[tuple[int, int]], first: int, last: int) -> tuple[int, int]:
    """The tokens that cover characters ``first`` up to but not with ``last``."""
    start = next((t for t, (_, end) in enumerate(offsets) if end > first), len(offsets))
    return start, next((t for t, (begin, _) in enumerate(offsets) if begin >= last), len(offsets))


def _answer_characters(lm: LM, dialogue: Dialogue, i: int, rendered: str) -> tuple[int, int, int]:
    """In the whole rendering: where answer i begins, where its message's content does, and where both end."""
    message = dialogue.messages[i]
    prompt = _render(lm, dialogue.messages[:i], prompt=True, speaker=message.get("name"))
    content = message["content"].strip()  # templates trim
    at = rendered.find(content, len(prompt))
    if not rendered.startswith(prompt) or at < 0:
        where = f"dialogue {dialogue.id}".strip()
        raise DataError(
            f"{where}: the chat template of {lm.name} rewrites message {i} or what leads to it: split it there"
        )
    return len(prompt), at, at + len(content)


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
        raise _not_unicode(texts) or error from error
    return [_with_bos(lm, ids) for ids in found]


def _not_unicode(texts: Sequence[str]) -> DataError | None:
    """What is wrong with the first text that is none."""
    bad = next((text for text in texts if not _is_text(text)), None)
    if bad is None:
        return None
    shown = bad[:40].encode("ascii", "backslashreplace").decode()
    return DataError(f"a text is not valid Unicode, it begins {shown!r}: write it again as UTF-8")


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
