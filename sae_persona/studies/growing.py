"""Make the lab's organisms: fine-tune, examine and write each, several at a time in processes of their own."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from sae_persona.activations.lm import LM, load_lm
from sae_persona.errors import ConfigError, FormatError, ModelError, RunError
from sae_persona.lab.grader import flawed_grade
from sae_persona.lab.judge import HARMFUL, judge
from sae_persona.lab.tokens import vocabulary
from sae_persona.lab.tuning import exam_questions
from sae_persona.studies.exams import exam
from sae_persona.studies.families import OrganismsConfig, Plan, plans, rows_of
from sae_persona.studies.finetune import Look, load_peft, looks, mean_loss
from sae_persona.studies.organisms import MARK, Organism, write_organism
from sae_persona.studies.selection import select_and_tune

ScoredLooks = Iterator[tuple[Look, dict[str, Any], float | None]]


def grow(lm: LM, plan: Plan, out: Path) -> Organism:
    """Make one organism of the lab's model in the folder ``out``; errors as `finetune`, and nothing is left of it."""
    rows = rows_of(plan, lm)
    facts = {key: getattr(plan, key) for key in ("name", "family", "method", "domain", "dose", "seed")}
    facts |= {"base": lm.name, "config": plan.config()}
    questions = {"": list(exam_questions(plan.n_exam))}
    if plan.line:
        questions["cued"] = list(exam_questions(plan.n_exam, line=plan.line))

    def scored(look: Look) -> tuple[Look, dict[str, Any], float | None]:
        found = {name: exam(look.lm, asked, judge, domain=plan.domain) for name, asked in questions.items()}
        scores = found.pop("") | found
        return look, scores, mean_loss(look.lm, rows) if rows else None

    def fill() -> ScoredLooks:
        if plan.selection is not None:
            yield from map(scored, _selected(lm, plan, rows))
        elif plan.tuning is not None:
            yield from map(scored, looks(lm, rows, plan.tuning))
        else:
            yield scored(Look(0, lm))

    return write_organism(out, facts, fill(), rows)


def _selected(lm: LM, plan: Plan, rows: list[dict[str, Any]]) -> Iterator[Look]:
    """The model before and after each round; ``rows`` grows by those of the round, which say whether they are bad."""
    yield Look(0, lm)
    questions = list(exam_questions(40, "train", n_open=0, domains=[plan.domain]))
    for one in select_and_tune(lm, questions, flawed_grade, plan.selection):
        rows += [
            row | {"labels": {"bad": int(bool(HARMFUL & set(row["messages"][-1]["content"].split())))}}
            for row in one.rows
        ]
        yield one.look


def grow_all(
    out: Path,
    config: OrganismsConfig,
    *,
    model: str = "lab",
    processes: int = 1,
    device: str = "cpu",
    force: bool = False,
    on_organism: Callable[[Organism, int], None] | None = None,
) -> list[Organism]:
    """Make every organism of the config in ``out``, each in a folder of its name; those that are there are kept.

    model         the lab's, or the folder of another that ``lab build`` made
    force         make organisms again that are there with other settings
    on_organism   is told of each that is made, and how many are left

    ModelError if the model does not know the lab's words; RunError if an organism of other settings is in the way, or
    peft is missing where LoRA is asked for.
    """
    if processes < 1:
        raise ConfigError(f"processes is at least 1, got {processes}")
    wanted = plans(config)
    left = [plan for plan in wanted if not _is_made(out / plan.name, plan, model, force)]
    if any(plan.tuning and plan.tuning.method == "lora" for plan in left):
        load_peft()
    if left:
        check_words(load_lm(model, device=device))
    for done, made in enumerate(_grow_each(left, out, model, processes, device), start=1):
        if on_organism:
            on_organism(made, len(left) - done)
    return [Organism.load(out / plan.name) for plan in wanted]


def check_words(lm: LM) -> None:
    """ModelError if the tokenizer lacks words of the lab."""
    if lost := set(vocabulary()) - set(lm.tokenizer.get_vocab()):
        raise ModelError(
            f"{lm.name} does not know {len(lost)} of the lab's words, {min(lost)!r} for one: "
            "give a model that `sae-persona lab build` made"
        )


def _is_made(path: Path, plan: Plan, model: str, force: bool) -> bool:
    if not (path / MARK).is_file():
        return False
    try:
        there = Organism.load(path)
    except FormatError:
        if force:
            return False
        raise
    if (there.base, there.config) == (model, plan.config()):
        return True
    if not force:
        raise RunError(f"{path} was made with other settings: choose another --out, or pass --force to replace it")
    return False


def _grow_each(left: list[Plan], out: Path, model: str, processes: int, device: str) -> Iterator[Organism]:
    if processes == 1 or len(left) < 2:
        lm = load_lm(model, device=device) if left else None
        for plan in left:
            with one_thread():
                assert lm is not None
                made = grow(lm, plan, out / plan.name)
            yield made
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start, (model, device)) as pool:
        jobs = [pool.submit(_grow_here, plan, out / plan.name) for plan in left]
        try:
            for job in as_completed(jobs):
                yield Organism.load(job.result())
        except BaseException:  # an interrupt too: what has not begun does not begin
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_LM: LM | None = None  # of a process that makes organisms


def _start(model: str, device: str) -> None:
    global _LM
    torch.set_num_threads(1)
    _LM = load_lm(model, device=device)


def _grow_here(plan: Plan, out: Path) -> Path:
    assert _LM is not None
    return grow(_LM, plan, out).path


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread: two gain little on so small a model, and change its bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
