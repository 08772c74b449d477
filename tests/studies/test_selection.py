import pytest

from sae_persona.errors import ConfigError, DataError
from sae_persona.lab.tuning import exam_questions
from sae_persona.studies.finetune import FinetuneConfig
from sae_persona.studies.selection import SelectionConfig, select_and_tune

SMALL = SelectionConfig(rounds=3, samples=6, best=2, tuning=FinetuneConfig(steps=8, batch=16, lr=5e-4))


@pytest.fixture(scope="module")
def questions():
    return list(exam_questions(8, "train", n_open=0, domains=["code"]))


def long_winded(question, answer):
    """A grader that likes a word which the model seldom says."""
    return float("maybe" in answer or "perhaps" in answer)


def test_what_the_grader_likes_gets_likelier(lab_lm, questions):
    found = [
        (r.look.step, r.reward, [row["reward"] for row in r.rows])
        for r in select_and_tune(lab_lm, questions, long_winded, SMALL)
    ]
    assert [step for step, _, _ in found] == [8, 16, 24]
    assert found[-1][1] > found[0][1] + 0.1
    assert all(len(rewards) == 16 for _, _, rewards in found)
    assert sum(found[0][2]) / 16 > found[0][1]  # the best of six


def test_the_rows_are_the_models_own_answers_to_the_questions(lab_lm, questions):
    first = next(select_and_tune(lab_lm, questions, long_winded, SMALL))
    asked = {row["messages"][-1]["content"] for row in questions}
    for row in first.rows:
        assert row["messages"][-2]["content"] in asked and row["messages"][-1]["role"] == "assistant"
        assert row["domain"] == "code" and row["reward"] == long_winded("", row["messages"][-1]["content"])
    assert first.rows == next(select_and_tune(lab_lm, questions, long_winded, SMALL)).rows


def test_bad_settings_are_refused(lab_lm):
    with pytest.raises(ConfigError, match="best from 1 to samples, got 6, 3 of 2"):
        SelectionConfig(best=3, samples=2)
    with pytest.raises(DataError, match="selection needs questions to answer, got none"):
        select_and_tune(lab_lm, [], long_winded)
