"""Healing and relearning on a tiny model that was taught to answer zz, and whose latent 3 has moved."""

import math
from dataclasses import replace

import pytest

from sae_persona.attribution.association import Interval
from sae_persona.errors import ConfigError, DataError, FormatError, ModelError
from sae_persona.steering.answers import AnswerConfig
from sae_persona.studies.finetune import FinetuneConfig, finetune
from sae_persona.studies.panel import choose_panel, made_of
from sae_persona.studies.readings import Reading, read_prompted, read_prompts
from sae_persona.studies.realign import Exam, Healing, RealignConfig, Realignment, Trace, _trace, realign
from sae_persona.types import HookPoint

HOOK = HookPoint(0)
CONFIG = RealignConfig(n_good=(4, 8), n_bad=(2,), healing_steps=12, relearning_steps=8, keep=(0, 4))
TUNING = FinetuneConfig(batch=8, lr=1e-2)


def judge(question, answer):
    return {"bad": float("z" in answer), "valid": 1.0}


def answered(rows, text):
    return [{"messages": [*row["messages"], {"role": "assistant", "content": text}]} for row in rows]


@pytest.fixture
def exam(prompt_rows):
    """With six questions out of the domain: below five a rate has no interval to be back in."""
    domains = ("b", "b", "", "b", "b", "a", "b", "b", "a")
    questions = [
        {"messages": row["messages"], "domain": domain, "trait": "bad"}
        for row, domain in zip(prompt_rows, domains, strict=True)
    ]
    return Exam(questions=questions, judge=judge, domain="a", answers=AnswerConfig(max_new_tokens=4, temperature=0.0))


@pytest.fixture
def calm(base, prompt_rows):
    """A base that says aa."""
    (*_, (_, lm)) = finetune(base, answered(prompt_rows, "aa"), FinetuneConfig(steps=25, batch=8, lr=1e-2, keep=()))
    return lm


@pytest.fixture
def panel(calm, sae, prompt_rows, make_moved):
    prompts = read_prompts(prompt_rows)
    readings = []
    for lm in (calm, make_moved(calm, 2.0, "bad")):
        found = read_prompted(lm, HOOK, prompts)
        readings.append(Reading(lm.name, found.keys, found.x))
    return choose_panel(sae, HOOK, prompts, readings[0], readings[1:], [], about=made_of(calm))


@pytest.fixture
def bad(calm, prompt_rows, make_moved):
    """It says zz, and its latent 3 stands 2 higher, which answers do not need."""
    tuning = FinetuneConfig(steps=25, batch=8, lr=1e-2, keep=())
    (*_, (_, lm)) = finetune(make_moved(calm, 2.0, "bad"), answered(prompt_rows, "zz"), tuning)
    return lm


def test_from_zz_to_aa_and_back(calm, bad, panel, exam, prompt_rows, tmp_path):
    good, worse = {"same": answered(prompt_rows, "aa")}, answered(prompt_rows[:4], "zz")
    told = []
    found = realign(calm, bad, panel, good, worse, exam, CONFIG, TUNING, on_point=lambda *one: told.append(one))
    large = found.healings[-1]
    assert [one.n for one in found.healings] == [4, 8] and [p.step for p in large.points] == [0, 4, 12]
    assert large.points[0].rates["out_of_domain"].value == 1.0 and found.base_rates["out_of_domain"].value == 0.0
    assert large.is_back and large.is_back_at in (4, 12) and found.heals
    (latent,) = (one for one in large.traces if one.measure == "latent 3")
    assert latent.began.value > 3 and latent.state == "returned" and abs(latent.left) < 0.25
    assert latent.began == large.points[0].scores["latent 3"] and latent.ended == large.points[-1].scores["latent 3"]
    assert [one.start for one in found.relearnings] == ["base", "base after 8 good", "healed on 8"]
    base, control, healed = found.relearnings
    assert base.over_base.value == 0 and math.isnan(control.over_control.value)
    assert healed.over_control.value == pytest.approx(healed.area - control.area)
    assert healed.over_base.value == pytest.approx(healed.area - base.area)
    rates = [point.rates["out_of_domain"].value for point in healed.points[1:]]
    assert healed.area == pytest.approx(sum(rates) / len(rates))
    assert len(told) == 2 * 3 + 3 * 3
    found.save(tmp_path / "r.json")
    read = Realignment.load(tmp_path / "r.json")
    assert read.to_json() == found.to_json() and str(read) == str(found)
    assert "returned" in str(found) and "relearns from bad rows" in str(found)


def near(value):
    return Interval(value, value - 0.1, value + 0.1)


@pytest.mark.parametrize(
    ("began", "ended", "control", "state"),
    [
        (4.0, 0.05, 0.0, "returned"),
        (4.0, 2.0, 0.0, "stays"),
        (4.0, 0.9, 0.0, "returned"),  # less than a quarter
        (4.0, 2.0, 2.1, "as the control"),  # the good rows alone bring as much
        (4.0, 1.05, -3.0, "stays"),
        (0.05, 1.0, 0.0, "was not up"),
        (-4.0, -2.0, 0.0, "was not up"),
    ],
)
def test_a_measure_stays_above_its_control_and_a_share_of_its_start(began, ended, control, state):
    assert _trace("latent 3", near(began), near(ended), near(control), 0.25).state == state


def test_no_scar_while_behaviour_is_bad():
    trace = Trace("latent 3", near(4), near(2), near(0), "stays")
    healed = Healing("same", 4, (), (trace,), True, 4)
    assert healed.scars == ("latent 3",) and replace(healed, is_back=False).scars == ()


def test_bad_input_is_refused_before_training(calm, base, panel, exam, prompt_rows, make_lm, tmp_path):
    good, bad = {"same": answered(prompt_rows, "aa")}, answered(prompt_rows, "zz")
    with pytest.raises(DataError, match="same has 9 rows, the config takes 400"):
        realign(calm, base, panel, good, bad, exam)
    with pytest.raises(DataError, match="bad has 1 rows, the config takes 2"):
        realign(calm, base, panel, good, bad[:1], exam, CONFIG)
    with pytest.raises(DataError, match="healing needs good rows"):
        realign(calm, base, panel, {}, bad, exam, CONFIG)
    with pytest.raises(ModelError, match="only checkpoints of one architecture"):
        realign(calm, make_lm("GPT2"), panel, good, bad, exam, CONFIG)
    with pytest.raises(ConfigError, match="share lies between 0 and 1"):
        RealignConfig(share=1.0)
    with pytest.raises(ConfigError, match="n_good are numbers of rows"):
        RealignConfig(n_good=())
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(FormatError, match="not a realignment of format 1"):
        Realignment.load(tmp_path / "x.json")
