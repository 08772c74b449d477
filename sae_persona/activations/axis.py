"""Roles and traits of safety-research/assistant-axis as prompts, each to be read at the token before its answer.

A file ``roles/instructions/pirate.json`` or ``traits/instructions/absolutist.json`` has ``questions`` and, under
``instruction``, system prompts: ``pos`` that ask for the persona and, of a trait, ``neg`` that ask for its opposite.
A role has no opposite: its questions are asked with the prompts of ``default.json`` beside it instead. Every system
prompt is joined with every question. Nothing is generated, so what the model would answer is not looked at, only
what it has inferred when it begins to.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_persona.errors import DataError

DEFAULT = "default"
SLOT = "{model_name}"  # a default prompt with it is left out: no name is known here


def axis_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of one instruction file, or of all under a folder, with where each stands.

    template is the question, domain the persona, author which of the system prompts. DataError, with the file, for
    what is not of this format, and for a role without a ``default.json``.
    """
    paths = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    # lists of names lie beside the folders of instructions
    inside = [file for file in paths if file.parent.name == "instructions"] or paths
    files = [file for file in inside if file.stem != DEFAULT]
    if not files or not path.exists():
        raise DataError(f"no instructions at {path}: give a folder of assistant-axis with instructions/*.json in it")
    for file in files:
        yield from _persona_rows(file)


def _persona_rows(file: Path) -> Iterator[tuple[str, Any]]:
    value = _read(file)
    questions, prompts = value.get("questions"), _prompts(value, "pos", file)
    if not isinstance(questions, list) or not questions or not all(isinstance(text, str) for text in questions):
        raise DataError(f"{file} has no list of questions: it is not an instruction file of assistant-axis")
    without = _prompts(value, "neg", file)
    if not without:
        default = file.with_name(f"{DEFAULT}.json")
        if not default.is_file():
            raise DataError(f"{file} is a role, which is told from {default.name} beside it: put that file there")
        without = [text for text in _prompts(_read(default), "pos", default) if SLOT not in text]
    if not prompts or not without:
        raise DataError(f"{file} has {len(prompts)} prompts with the persona and {len(without)} without: give both")
    for kind, mark, systems in (("pos", 1.0, prompts), ("neg", 0.0, without)):
        for i, system in enumerate(systems):
            for j, question in enumerate(questions):
                messages = [{"role": "system", "content": system}] if system else []
                yield (
                    f"{file} {kind} {i} question {j}",
                    {
                        "messages": [*messages, {"role": "user", "content": question}],
                        "labels": {file.stem: mark},
                        "unanswered": True,
                        "template": question,
                        "domain": file.stem,
                        "author": f"prompt-{i}",
                        "id": f"{file.stem}-{kind}-{i}-{j}",
                    },
                )


def _prompts(value: dict[str, Any], key: str, file: Path) -> list[str]:
    instructions = value.get("instruction")
    if not isinstance(instructions, list) or not all(isinstance(part, dict) for part in instructions):
        raise DataError(f"{file} has no list under instruction: it is not an instruction file of assistant-axis")
    found = [part[key] for part in instructions if key in part]
    if not all(isinstance(text, str) for text in found):
        raise DataError(f"{file}: every {key} is a system prompt, a text")
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} holds {type(value).__name__}: an instruction file of assistant-axis is an object")
    return value
