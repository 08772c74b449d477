import math

import pytest
import torch

from sae_persona.errors import ConfigError, DataError
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.interventions import Clamp, Placed, Steer
from sae_persona.steering.side_effects import HeldOut
from sae_persona.studies.battery import Battery, Variant, check_apart
from sae_persona.types import HookPoint

HOOK, ANSWERS = HookPoint(0), AnswerConfig(max_new_tokens=3)
UNDO = [Placed(edit=Clamp(3, -1.0, 2.0), hook=HOOK)]


def battery(planted, *more, held_out=None, judge=None):
    core = Variant(name="out of domain", questions=planted.test[:6], core=True)
    return Battery(
        planted.base, planted.tuned, {HOOK: planted.sae}, [core, *more], judge or planted.judge, ANSWERS, held_out
    )


def test_arms_are_held_against_base_and_tuned(planted):
    made = battery(planted)
    base, tuned, undone = (one.cells["out of domain"] for one in (made.base, made.untreated, made.run("x", "c", UNDO)))
    assert (base.rate.value, tuned.rate.value, undone.rate.value) == (0, 1, 0)
    assert (base.change.value, tuned.change.value, undone.change.value) == (-1, 0, -1)
    assert (base.excess.value, tuned.excess.value, undone.excess.value) == (0, 1, 0)
    assert tuned.correct_loss.value == 1 and undone.correct_loss.value == 0 and undone.n == 6
    assert undone.rate.high > 0.2, "six questions say little"


def test_what_breaks_answers_does_not_align_them(planted):
    def judge(question, text):
        return {"bad": float("z" in text), "valid": float("a" in text)}

    cell = battery(planted, judge=judge).run("x", "c", UNDO).cells["out of domain"]
    assert cell.change.value == -1 and cell.aligned.value == cell.valid.value < 1
    assert cell.aligned_gain.value == cell.aligned.value
    unknown = battery(planted, judge=lambda q, text: {"bad": float("z" in text)})
    assert unknown.run("x", "c", UNDO).cells["out of domain"].aligned.value == 1


def test_a_variant_may_have_a_model_of_its_own(planted):
    healed = Variant(name="healed", questions=planted.test[6:], lm=planted.base)
    made = battery(planted, healed)
    assert {name: cell.rate.value for name, cell in made.untreated.cells.items()} == {"out of domain": 1, "healed": 0}
    assert {name: cell.n for name, cell in made.untreated.cells.items()} == {"out of domain": 6, "healed": 3}
    assert list(made.run("x", "random latents", UNDO, core_only=True).cells) == ["out of domain"]


def test_what_a_judge_does_not_say_is_not_known(planted):
    made = battery(planted, judge=lambda question, text: {"bad": float("z" in text)})
    cell = made.untreated.cells["out of domain"]
    assert math.isnan(cell.valid.value) and math.isnan(cell.correct_loss.value) and cell.rate.value == 1


def test_a_prompt_goes_before_the_question(planted):
    seen = []

    def judge(question, text):
        seen.append(question)
        return planted.judge(question, text)

    arm = battery(planted, judge=judge).run_prompt("p", "prompt", "be good")
    assert arm.cells["out of domain"].n == 6 and set(seen) == {
        row["messages"][-1]["content"] for row in planted.test[:6]
    }


def test_cross_entropy_is_read_with_the_edit_everywhere(planted):
    held_out = HeldOut(planted.tuned, ["some text or other", "and more of it"])
    made = battery(planted, held_out=held_out)
    arm = made.run("x", "chosen", [Placed(edit=Steer(torch.eye(16)[3], 1.0), hook=HOOK)])
    assert arm.ce is not None and arm.ce.value != 0
    assert made.untreated.ce is None and made.run("x", "random latents", UNDO, core_only=True).ce is None


def test_development_and_test_are_apart(planted):
    core = Variant(name="out of domain", questions=planted.test, core=True)
    check_apart(planted.development, [core])
    cued = [
        {
            **planted.development[0],
            "messages": [{"role": "system", "content": "x"}, *planted.development[0]["messages"]],
        }
    ]
    with pytest.raises(
        DataError, match="1 question is in the development and the 'cued' set, the first \"what do you want\""
    ):
        check_apart(planted.development, [core, Variant(name="cued", questions=cued)])
    with pytest.raises(ConfigError, match="'empty' has no questions"):
        check_apart(planted.development, [core, Variant(name="empty", questions=[])])
    with pytest.raises(ConfigError, match="'out of domain' is there twice"):
        check_apart(planted.development, [core, core])
    with pytest.raises(DataError, match="a question needs messages"):
        check_apart(planted.development, [Variant(name="x", questions=[{"text": "hello"}])])
