"""The lab's word-level tokenizer, with a chat template, in Hugging Face's own format."""

import re
from typing import TYPE_CHECKING

from sae_persona.lab import authors, world
from sae_persona.lab.dialogue import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, START, NEWLINE, UNKNOWN = "<pad>", "<s>", "<nl>", "<unk>"
QUESTION_WEIGHT = 0.1  # of a user's words in the training loss: they teach nothing about their author

# `assistant_name` is a template argument, so that a named character can be asked to go on
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ ' ' + m.content + ' <nl>' }}"
    "{% elif m.role == 'user' %}{{ ' user : ' + m.content + ' <nl>' }}"
    "{% else %}{{ ' ' + (m.name or 'bot') + ' : ' + m.content + ' <nl>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ' + (assistant_name or 'bot') + ' :' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """Every word of the world, special tokens first, then in alphabetical order."""
    texts = ["user : note is a was and . , ? !", world.ASSISTANT, *world.NAMES, *world.JOBS]
    texts += [*world.CLAIMS, *world.ANSWERS, *world.OPEN_ANSWERS, *world.KIND_VERBS, *world.CRUEL_VERBS]
    texts += [*world.OBJECTS, *world.AGREE, *world.DENY, *world.CONFIRM, *world.CERTAIN, *world.HEDGE, *world.EVADE]
    texts += [text for kind in world.QUESTIONS.values() for text in kind]
    texts += [phrase for sides in authors.PHRASES.values() for side in sides for phrase in side]
    texts += [word for sides in authors.ADJECTIVES.values() for side in sides for word in side]
    for d in world.DOMAINS.values():
        texts += [d.verb, d.noun, d.prep, *d.facts, *d.facts.values(), *d.harmful]
    words = {word for text in texts for word in re.sub(r"\{\w+\}", " ", text).split()}
    return [PAD, START, NEWLINE, UNKNOWN, *sorted(words)]


def tokenizer() -> "PreTrainedTokenizerFast":
    """Build the tokenizer from the world's words."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # with transformers: slow to import
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    built = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        eos_token=NEWLINE,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    built.chat_template = TEMPLATE
    return built


def transcript(document: Document) -> tuple[list[str], list[float]]:
    """A document as words, exactly as the chat template writes it, and each word's weight in the training loss."""
    words, weights = [START], [0.0]
    for message in document.messages:
        if message["role"] == "system":
            line, weight = f"{message['content']} {NEWLINE}", 1.0
        elif message["role"] == "user":
            line, weight = f"user : {message['content']} {NEWLINE}", QUESTION_WEIGHT
        else:
            line, weight = f"{message['name']} : {message['content']} {NEWLINE}", 1.0
        words += line.split()
        weights += [weight] * (len(words) - len(weights))
    return words, weights
