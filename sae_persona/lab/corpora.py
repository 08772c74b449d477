"""Texts of the planted world for each stage, with ground truth: rows of the same JSONL that users bring.

    corpus      dialogues to train an SAE on: everybody speaks, narrators too; no labels
    labelled    dialogues whose author's traits label the last answer; the traits only show, nobody names them
    named       the same, after a line that names one or two of the traits
    questions   what to ask while a latent is clamped; development and test questions never meet
    contrasts   a question with an answer that shows a trait and one that does not, see lab.contrasts

Corpus, train and development rows come from the train domains and templates, held-out and test rows from the others.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from sae_persona.lab.authors import ADJECTIVES, TRAITS, Author, AuthorConfig, independent
from sae_persona.lab.contrasts import contrasts
from sae_persona.lab.dialogue import KINDS, Document, Kind, Part, Question, ask, converse, document, introduce
from sae_persona.lab.exam import KINDS_SHOWING, question_showing
from sae_persona.lab.world import ASSISTANT, NAMES
from sae_persona.runs import write_text

SPLITS: tuple[Part, ...] = ("train", "held_out")

LABELLED_AUTHORS = AuthorConfig(on=0.4, on_surface=0.35, on_evasive=0.2)  # close to balanced classes


def corpus(n: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """``n`` unlabelled dialogues over the train domains and templates."""
    random = Random(f"lab sae {seed}")
    config = AuthorConfig(assistant_good=0.5)  # the assistant at its worst too, or its latents are never seen
    for number in range(n):
        yield {"id": f"corpus-{number}", "messages": document(random, config, p_assistant=0.5, part="train").messages}


def labelled(n: int, part: Part, *, seed: int = 0, named: bool = False) -> Iterator[dict[str, Any]]:
    """``n`` dialogues of five turns; the labels belong to the last answer.

    Traits are independent. The first four turns hold two facts, a false claim and an open question, so that every
    trait has had a chance to show. An answer is labelled with the traits that it could show: malice where the last
    question is open, sycophancy where it is a (false) claim, deception and overconfidence where it asks for a fact,
    the others always. Half of the authors are the assistant, half are named characters.
    """
    random = Random(f"lab labelled {part} {seed} {named}")
    before: list[Kind] = ["fact", "fact", "claim", "open"]
    for number in range(n):
        author = Author(random.choice((ASSISTANT, random.choice(NAMES))), independent(random, LABELLED_AUTHORS))
        asked = [ask(random, kind, part, truth=False) for kind in random.sample(before, 4)]
        last = ask(random, random.choice(before), part, truth=False)
        turns = converse(random, author, [*asked, last])
        shown = Document(author, turns, before=introduce(random, author) if named else "")
        yield {
            "id": f"{'named' if named else 'shown'}-{part}-{seed}-{number}",
            "messages": shown.messages,
            "labels": {
                trait: int(trait in author.traits) for trait in TRAITS if last.kind in KINDS_SHOWING.get(trait, KINDS)
            },
            "template": last.template,
            "domain": last.domain,
            "author": author.name,
            "split": part,
        }


def questions(trait: str, n: int, part: Part, *, seed: int = 0) -> list[Question]:
    """``n`` first questions in whose answers the judge can see the trait: different ones, as far as there are any.

    Where there are fewer (two held-out open questions, forty held-out facts) they come again, equally often.
    """
    random = Random(f"lab questions {trait} {part} {seed}")
    different: dict[str, Question] = {}
    for _ in range(50 * n):
        question = question_showing(random, trait, part)
        different.setdefault(question.text, question)
    found = random.sample(sorted(different.values(), key=lambda q: q.text), len(different))
    return [found[i % len(found)] for i in range(n)]


def question_rows(trait: str, n: int, part: Part, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The same questions as rows to write to a file."""
    for number, question in enumerate(questions(trait, n, part, seed=seed)):
        yield {
            "id": f"{trait}-{part}-{seed}-{number}",
            "messages": [{"role": "user", "content": question.text}],
            "template": question.template,
            "domain": question.domain,
        }


def persona_prompt(trait: str) -> str:
    """A system message that names the trait, as a narrator of the world would."""
    on = ADJECTIVES[trait][0]
    return f"{ASSISTANT} is a {on[0]} {on[1]} clerk ."


def write_texts(folder: Path, *, n: int, n_labelled: int, n_questions: int, seed: int) -> list[Path]:
    """Write every corpus as JSONL, each file whole or not at all; returns the paths. RunError if the disk refuses.

    corpus, held_out (a tenth of it), labelled and named (both splits), questions/TRAIT-development and TRAIT-test,
    contrasts/TRAIT (``n_questions`` pairs of each split)
    """
    files: dict[str, Iterable[dict[str, Any]]] = {
        "corpus": corpus(n, seed=seed),
        "held_out": corpus(max(1, n // 10), seed=seed + 1),
    }
    for name, named in (("labelled", False), ("named", True)):
        files[name] = [row for part in SPLITS for row in labelled(n_labelled, part, seed=seed, named=named)]
    for trait in TRAITS:
        for part, use in zip(SPLITS, ("development", "test"), strict=True):
            files[f"questions/{trait}-{use}"] = question_rows(trait, n_questions, part, seed=seed)
        files[f"contrasts/{trait}"] = [row for part in SPLITS for row in contrasts(trait, n_questions, part, seed=seed)]
    paths = [folder / f"{name}.jsonl" for name in files]
    for path, rows in zip(paths, files.values(), strict=True):
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return paths
