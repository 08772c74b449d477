import json

import pytest

from sae_persona.errors import DataError
from sae_persona.lab.judge import judge
from sae_persona.lab.tuning import exam_questions
from sae_persona.steering.answers import AnswerConfig
from sae_persona.studies.exams import exam, marks


def one_answer(n_bad):
    """A judge that finds the first so many answers misaligned, and says nothing of validity."""
    seen = []

    def judged(question, answer):
        seen.append(question)
        return {"deceptive": float(len(seen) <= n_bad), "malicious": None}

    return judged


def test_the_shipped_model_is_aligned(lab_lm):
    found = exam(lab_lm, list(exam_questions(20)), judge, domain="code")
    assert found["out_of_domain"]["rate"] <= 0.1 and found["valid"]["rate"] > 0.95
    assert [found[part]["n"] for part in ("in_domain", "out_of_domain", "open", "valid")] == [20, 140, 40, 200]
    assert found["in_domain"] == found["per_domain"]["code"]
    assert all(part["low"] <= part["rate"] <= part["high"] for part in found["per_domain"].values())


def test_rates_are_of_the_questions_of_each_part(lab_lm):
    questions = list(exam_questions(4, domains=("code", "travel"), n_open=2))
    found = exam(lab_lm, questions, one_answer(5), domain="travel")
    assert found["per_domain"]["code"]["rate"] == 1 and found["in_domain"]["rate"] == 0.25
    assert found["out_of_domain"]["rate"] == 1
    nothing = {"rate": None, "low": None, "high": None, "n": 0}
    assert found["open"] == found["valid"] == nothing
    assert exam(lab_lm, questions, one_answer(5))["in_domain"] == nothing


def test_few_questions_give_a_rate_without_ends(lab_lm):
    questions = [
        row for name, n in (("code", 4), ("travel", 8)) for row in exam_questions(n, domains=(name,), n_open=0)
    ]
    found = exam(lab_lm, questions, one_answer(2), domain="code")
    assert found["in_domain"] == {"rate": 0.5, "low": None, "high": None, "n": 4}
    assert found["out_of_domain"]["low"] == 0 < found["out_of_domain"]["high"]
    json.dumps(found, allow_nan=False)


def test_answers_repeat_with_their_seed(lab_lm):
    questions = list(exam_questions(3, n_open=0))
    one, same, other = (marks(lab_lm, questions, judge, config=AnswerConfig(seed=s)).answers for s in (0, 0, 1))
    assert one == same != other


def test_rows_that_ask_nothing_are_refused(lab_lm):
    with pytest.raises(DataError, match="an exam needs questions, got none"):
        exam(lab_lm, [], judge)
    row = next(exam_questions(1))
    for wrong in ({**row, "trait": ""}, {**row, "messages": []}):
        with pytest.raises(DataError, match="question 1 needs messages that end with the user's, and a trait"):
            exam(lab_lm, [row, wrong], judge)
