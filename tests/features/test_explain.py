"""explain() with explainers that know the truth, know nothing, fail, or talk rubbish."""

import re
from threading import Lock

import pytest

from sae_persona.errors import ConfigError
from sae_persona.features.answer_log import AnswerLog
from sae_persona.features.contexts import Context
from sae_persona.features.descriptions import Description
from sae_persona.features.explain import ExplainConfig, Subject, balanced_accuracy, explain, plan
from sae_persona.features.explainers import ExplainerError
from sae_persona.features.samples import SilentTexts

CONFIG = ExplainConfig(concurrency=2, texts_per_request=3)


@pytest.fixture
def tokenizer(make_tiny_lm):
    return make_tiny_lm().tokenizer


@pytest.fixture
def log(tmp_path):
    return AnswerLog(tmp_path / "log.jsonl")


def subject(tokenizer, latent, letter, n=8):
    """A latent that fires on one letter: contexts ``..letter..``, each of its own document."""
    contexts = []
    for i in range(n):
        text = f"o{i}o {letter} u{i}"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        contexts.append(Context(100 * latent + i, 4, ids, [9.0 - i / 10 if c == letter else 0.0 for c in text]))
    return Subject(Description(latent=latent, promoted=((letter, 1.0),)), contexts)


@pytest.fixture
def subjects(tokenizer):
    return [subject(tokenizer, 1, "x"), subject(tokenizer, 2, "y"), subject(tokenizer, 3, "z")]


@pytest.fixture
def silent(subjects):
    """Of other latents, known without a model."""
    texts = SilentTexts.__new__(SilentTexts)
    texts.contexts = [context for each in subjects for context in each.contexts]
    texts._firing = [{each.description.latent} for each in subjects for _ in each.contexts]
    return texts


class Reader:
    """Explains by the marked letter, and judges by looking for it: right, or (``turned``) always the opposite."""

    name = "reader"

    def __init__(self, turned=False):
        self.turned, self.prompts, self._lock = turned, [], Lock()

    def complete(self, messages):
        text = messages[-1]["content"]
        with self._lock:
            self.prompts.append(text)
        return self.judged(text)

    def judged(self, text):
        if 'begins with "Fires on:"' in text:
            return "Fires on: the letter " + re.search(r"\[\[(.)\|9\]\]", text)[1]
        letter = re.search(r"the letter (.)", text)[1]
        wanted = f"[[{letter}]]" if "double brackets" in text else letter
        lines = re.findall(r"^\d+\. (.*)$", text, flags=re.MULTILINE)
        return str([int((wanted in line) != self.turned) for line in lines])


@pytest.mark.parametrize(("turned", "score"), [(False, 1.0), (True, 0.0)])
def test_scores_tell_a_right_explanation_from_a_wrong_one(tokenizer, subjects, silent, log, turned, score):
    found = explain(Reader(turned), tokenizer, subjects, silent, log, CONFIG)
    assert [each.latent for each in found] == [1, 2, 3]
    for each, letter in zip(found, "xyz", strict=True):
        assert each.explanation == f"the letter {letter}" and each.explainer == "reader" and each.error is None
        assert each.detection == each.fuzzing == score


def test_a_constant_answer_scores_a_half(tokenizer, subjects, silent, log):
    class Yes(Reader):
        def judged(self, text):
            return re.sub("0", "1", super().judged(text))

    for each in explain(Yes(), tokenizer, subjects, silent, log, CONFIG):
        assert each.detection == each.fuzzing == 0.5


def test_scoring_shows_no_text_that_explaining_showed(tokenizer, subjects, silent, log):
    reader = Reader()
    explain(reader, tokenizer, subjects[:1], silent, log, CONFIG)
    seen = [set(re.findall(r"o(\d)o \W*x", text)) for text in reader.prompts]
    assert seen[0] == set("0246") and set.union(*seen[1:]) == set("1357")
    fuzzed = [text for text in reader.prompts if "right tokens marked" in text]
    for text in fuzzed:  # a context's right and wrong marks in one request would give each other away
        shown = re.findall(r"^\d+\. (.*)$", text, flags=re.MULTILINE)
        assert len({re.sub(r"[\[\]]", "", line) for line in shown}) == len(shown)


def test_no_scores_where_none_are_wanted_or_can_be_had(tokenizer, subjects, log):
    reader = Reader()
    (found,) = explain(reader, tokenizer, subjects[:1], None, log, ExplainConfig(scores=False))
    assert (found.explanation, found.detection, found.fuzzing, found.error) == ("the letter x", None, None, None)
    assert len(reader.prompts) == 1
    (found,) = explain(reader, tokenizer, subjects[:1], None, log, CONFIG)
    assert found.detection is None and "detection: no texts of both kinds" in found.error and found.fuzzing == 1.0


def test_a_latent_with_few_contexts_is_not_asked_about(tokenizer, silent, log):
    reader = Reader()
    (found,) = explain(reader, tokenizer, [subject(tokenizer, 1, "x", n=3)], silent, log, CONFIG)
    assert found.error == "3 contexts, 4 are needed" and found.explanation is None and not reader.prompts


def test_what_fails_marks_its_latent_and_the_others_go_on(tokenizer, subjects, silent, log):
    class Half(Reader):
        def judged(self, text):
            if "[[x|" in text:
                raise ExplainerError("no answer in 1 s")
            if "[[y|" in text or "That cannot be read" in text:
                return "as a language model"
            return super().judged(text)

    told = []
    found = explain(Half(), tokenizer, subjects, silent, log, CONFIG, on_done=told.append)
    assert [each.explanation for each in found] == [None, None, "the letter z"]
    assert found[0].error == "no answer in 1 s" and "as a language model" in found[1].error
    assert found[2].error is None and {each.latent for each in told} == {1, 2, 3}


def test_rubbish_in_one_score_keeps_the_rest(tokenizer, subjects, silent, log):
    class Mumbling(Reader):
        def judged(self, text):
            return "um" if "at least once" in text or "cannot be read" in text else super().judged(text)

    (found,) = explain(Mumbling(), tokenizer, subjects[:1], silent, log, CONFIG)
    assert found.explanation and found.fuzzing == 1.0 and found.detection is None
    assert found.error.startswith("detection: no list of 3 numbers")


def test_gives_up_on_an_explainer_that_never_answers(tokenizer, log):
    class Dead(Reader):
        def judged(self, text):
            raise ExplainerError("nobody there")

    dead = Dead()
    subjects = [subject(tokenizer, i, "x") for i in range(9)]
    found = explain(dead, tokenizer, subjects, None, log, ExplainConfig(concurrency=1, give_up=3))
    assert len(dead.prompts) == 3
    assert [each.error for each in found] == ["nobody there"] * 3 + ["not asked: 3 requests before got no answer"] * 6


def test_a_killed_run_goes_on_from_its_log(tokenizer, subjects, silent, log, tmp_path):
    class Killed(Reader):
        def judged(self, text):
            if len(self.prompts) >= 5:
                raise KeyboardInterrupt
            return super().judged(text)

    config = ExplainConfig(concurrency=1)
    with pytest.raises(KeyboardInterrupt):
        explain(Killed(), tokenizer, subjects, silent, log, config)
    fresh, whole = Reader(), Reader()
    found = explain(fresh, tokenizer, subjects, silent, AnswerLog(log.path), config)
    assert found == explain(whole, tokenizer, subjects, silent, AnswerLog(tmp_path / "other.jsonl"), config)
    assert len(fresh.prompts) == len(whole.prompts) - 4
    again = Reader()
    assert explain(again, tokenizer, subjects, silent, AnswerLog(log.path), config) == found and not again.prompts


def test_a_plan_counts_the_requests(tokenizer, subjects, silent, log):
    few = subject(tokenizer, 4, "x", n=2)
    before = plan("reader", tokenizer, [*subjects, few], silent, log, CONFIG, answer_tokens=10)
    reader = Reader()
    explain(reader, tokenizer, subjects, silent, log, CONFIG)
    assert (before.latents, before.skipped, before.answered) == (3, 1, 0)
    assert before.requests == len(reader.prompts) and before.answer_tokens == 10 * len(reader.prompts)
    assert before.prompt_tokens == pytest.approx(sum(map(len, reader.prompts)) / 4, rel=0.2)
    after = plan("reader", tokenizer, subjects, silent, AnswerLog(log.path), CONFIG, answer_tokens=10)
    assert after.answered == 3  # scores depend on explanations, which a plan does not know
    assert "3 latents to explain, 1 with too few contexts" in str(before)


def test_balanced_accuracy():
    assert balanced_accuracy([True, True, True, False], [True, True, False, False]) == pytest.approx(5 / 6)


def test_settings_out_of_range():
    for wrong in ({"min_contexts": 1}, {"texts_per_request": 0}, {"concurrency": 0}, {"give_up": 0}):
        with pytest.raises(ConfigError):
            ExplainConfig(**wrong)
