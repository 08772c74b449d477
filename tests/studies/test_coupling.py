"""Effects are paired differences of judged rates, in the order of the traits."""

import numpy as np
import pytest
import torch

from sae_persona.attribution.association import Interval
from sae_persona.errors import DataError, FormatError
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.bench import Bench, Questions
from sae_persona.steering.interventions import Steer
from sae_persona.studies.coupling import Coupling, Effects, steered_effects, tuned_effects
from sae_persona.studies.finetune import FinetuneConfig
from sae_persona.studies.foretelling import COLUMN, Foretold
from sae_persona.types import HookPoint


@pytest.fixture
def bench(base, prompt_rows):
    def judge(question, answer):
        return {"a": float("a" in answer), "z": float("z" in answer), "valid": 1.0, "never": None}

    questions = Questions.of(base, "test", [row["messages"] for row in prompt_rows])
    return Bench(base, None, judge, questions, AnswerConfig(max_new_tokens=4), hook=HookPoint(0))


def rows(prompt_rows, text):
    return [{"messages": [*row["messages"], {"role": "assistant", "content": text}]} for row in prompt_rows]


def test_training_a_trait_moves_its_own_column(bench, prompt_rows):
    tuning, told = FinetuneConfig(steps=25, batch=8, lr=1e-2, keep=()), []
    given = {"a": rows(prompt_rows, "aa"), "z": rows(prompt_rows, "zz")}
    found = tuned_effects(bench, given, ["z", "a"], tuning, on_trait=lambda *one: told.append(one[:2]))
    assert found.traits == ("z", "a") and told == [("fine-tune", "z"), ("fine-tune", "a")]
    assert found.values[0, 0] > 0.5 and found.values[1, 1] > 0.5
    assert found.values[0, 1] <= 0 and found.values[1, 0] <= 0
    assert all(cell.low <= cell.value <= cell.high for row in found.matrix for cell in row)
    with pytest.raises(DataError, match="no rows to tune a on"):
        tuned_effects(bench, {"z": given["z"]}, ["z", "a"], tuning)
    with pytest.raises(DataError, match="never scores never"):
        tuned_effects(bench, {"never": given["z"]}, ["never"], tuning)


def test_an_edit_of_nothing_has_no_effect(bench):
    direction = torch.nn.functional.one_hot(torch.tensor(3), 16).float()
    edits = {"a": [Steer(direction, 0.0)], "z": [Steer(direction, 40.0)]}
    found = steered_effects("steer", bench, edits, [0.0, 40.0])
    assert (found.values[0] == 0).all() and found.strengths == (0.0, 40.0) and found.valid[1].value == 0
    assert found.base == tuple(np.nanmean(bench.ask([])[0].scores[t]) for t in ("a", "z"))


def coupling(p, r2, column):
    def near(value):
        return Interval(value, value - 0.1, value + 0.1)

    foretold = (Foretold("cosine of means", near(0.5), p, near(r2), 20), Foretold("RBO", near(0), 0.6, near(-1), 20))
    last = Foretold(COLUMN, near(0.4), float("nan"), near(column), 20)
    effects = Effects("clamp", ("a",), (1.0,), (0.1,), ((near(0.2),),), (near(0.0),))
    return Coupling("lm", ("a",), {}, {"RBO": ((1.0,),)}, (effects,), ((*foretold, last),))


def test_the_verdict_counts_all_measures():
    assert coupling(0.02, 0.3, 0.5).is_foretold() and not coupling(0.04, 0.3, 0.5).is_foretold()
    assert not coupling(0.02, -0.1, 0.5).is_foretold()
    assert coupling(0.04, 0.3, 0.5).verdict() == "clamp: coupling goes with no single measure beyond chance"
    assert coupling(0.02, 0.3, 0.5).verdict() == (
        "clamp: coupling goes with cosine of means beyond chance (Spearman +0.50, p 0.02); "
        "out of sample R2 +0.30 [+0.20, +0.40], of the mean of j's column +0.50"
    )


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(FormatError, match="not a coupling of format 1"):
        Coupling.load(tmp_path / "x.json")
