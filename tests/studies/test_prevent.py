"""What a guard prevents and costs, on a tiny model that is taught to answer zz."""

import math
from dataclasses import replace

import numpy as np
import pytest

from sae_persona.attribution.association import Interval
from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.steering.answers import AnswerConfig
from sae_persona.studies.finetune import FinetuneConfig, mean_loss
from sae_persona.studies.panel import choose_panel, made_of
from sae_persona.studies.prevent import (
    Arm,
    Asked,
    PreventConfig,
    Prevention,
    choose,
    prevent,
    rise,
    row_nats,
)
from sae_persona.studies.readings import Reading, read_prompted, read_prompts
from sae_persona.types import HookPoint

HOOK = HookPoint(0)
TUNING = FinetuneConfig(steps=14, batch=8, lr=1e-2)
CONFIG = PreventConfig(steer=(0.5, 0.1), penalty=(3.0,), n_random=1)


def judge(question, answer):
    return {"bad": float("z" in answer), "valid": float(len(answer) > 0)}


def question(text, domain):
    return {"messages": [{"role": "user", "content": text}], "domain": domain, "trait": "bad"}


@pytest.fixture
def asked(prompt_rows):
    texts = [row["messages"][0]["content"] for row in prompt_rows]
    domains = ("a", "b", "")
    return Asked(
        development=[question(text + "?", domains[i % 3]) for i, text in enumerate(texts)],
        test=[question(text + "!", domains[i % 3]) for i, text in enumerate(texts)],
        held_out=answered(prompt_rows, "good"),
        judge=judge,
        answers=AnswerConfig(max_new_tokens=4),
    )


def answered(rows, text):
    return [{"messages": [*row["messages"], {"role": "assistant", "content": text}], "domain": "a"} for row in rows]


@pytest.fixture
def panel(base, sae, prompt_rows, make_moved):
    prompts = read_prompts(prompt_rows)
    readings = []
    for lm in (base, make_moved(base, 2.0, "bad")):
        found = read_prompted(lm, HOOK, prompts)
        readings.append(Reading(lm.name, found.keys, found.x))
    return choose_panel(sae, HOOK, prompts, readings[0], readings[1:], [], about=made_of(base))


@pytest.fixture
def found(base, sae, prompt_rows, panel, asked):
    return prevent(base, answered(prompt_rows, "zz"), panel, sae, asked, TUNING, CONFIG)


def test_every_arm_is_examined_without_its_guard(found, tmp_path, prompt_rows, base):
    names = [(one.name, one.strength, one.chosen) for one in found.arms if not math.isnan(one.strength)]
    steered = [name for name in names if name[0].startswith("steer")]
    assert [one.name for one in found.arms[:2]] == ["base", "plain"]
    assert [name[:2] for name in steered if "latents" in name[0]] == [("steer latents", 0.1), ("steer latents", 0.5)]
    assert sum(one.chosen for one in found.arms) == 4, "one of each method and target"
    random, ours = found.arm("steer", "random 1"), found.arm("steer", "latents", chosen=True)
    assert random.strength == ours.strength and random.latents != ours.latents and len(random.latents) == 1
    plain, before = found.arm("plain"), found.arm("base")
    assert plain.loss < 0.5 * before.loss == pytest.approx(0.5 * mean_loss(base, answered(prompt_rows, "zz")))
    assert before.ce.value == 0 and plain.ce.low < plain.ce.value < plain.ce.high
    assert plain.test["in_domain"].value > before.test["in_domain"].value
    assert all(part.value == 0 for part in plain.against.values()) and before.against == {}
    for one in found.arms[2:]:
        moved = one.test["out_of_domain"].value - plain.test["out_of_domain"].value
        assert one.against["out_of_domain"].value == pytest.approx(moved)
    found.save(tmp_path / "p.json")
    assert Prevention.load(tmp_path / "p.json").to_json() == found.to_json()
    assert str(Prevention.load(tmp_path / "p.json")) == str(found)
    assert "steer: " in str(found) and "penalty latents" in str(found) and found.domain == "a"
    ends = {one.name: one.loss for one in found.arms if one.chosen or one.method == "plain"}
    assert len({round(loss, 6) for loss in ends.values()}) == len(ends), "no two arms are the same fine-tune"


def arm(strength, out, valid=1.0, **parts):
    def rate(value):
        return Interval(value, max(value - 0.1, 0), min(value + 0.1, 1))

    rates = {"in_domain": rate(0.9), "out_of_domain": rate(out), "open": rate(0.1), "valid": rate(valid)}
    given = {"method": "steer", "target": "latents", "against": {"out_of_domain": Interval(-0.5, -0.6, -0.4)}}
    return Arm(strength=strength, development=rates, test=rates, loss=1.0, ce=rate(0.0), **(given | parts))


@pytest.mark.parametrize(
    ("rates", "valid", "best"),
    [
        ((0.5, 0.08, 0.02), (1, 1, 1), 1),
        ((0.5, 0.3, 0.2), (1, 1, 1), 2),
        ((0.5, 0.08, 0.02), (1, 0.8, 1), 2),
        ((0.5, 0.5, 0.02), (1, 1, 0.8), 0),
        ((0.5, 0.4, 0.3), (0.1, 0.1, 0.1), 2),
    ],
)
def test_the_weakest_that_is_enough_is_chosen(rates, valid, best):
    tried = [arm(i + 1.0, out, v) for i, (out, v) in enumerate(zip(rates, valid, strict=True))]
    assert choose(tried, arm(0.0, 0.8), PreventConfig()) == best


def test_it_works_only_beyond_the_plain_fine_tune_and_every_random_set():
    def works(**parts):
        arms = (arm(0.0, 0.8, method="plain", target=""), arm(0.4, 0.1, chosen=True, **parts), rival)
        return Prevention("lm", "layers.0.resid_post", "a panel", "a", 1.0, {}, {}, arms).works("steer")

    rival = arm(0.4, 0.5, target="random 1")
    assert works()
    assert not works(against={"out_of_domain": Interval(-0.1, -0.3, 0.1)})
    rival = arm(0.4, 0.05, target="random 1")
    assert not works()


def test_cross_entropy_is_by_dialogue(base, prompt_rows):
    rows = [*answered(prompt_rows, "good"), *answered(prompt_rows[:2], "something longer")]
    nats = row_nats(base, rows, batch=4)
    assert nats[:, 0].sum() / nats[:, 1].sum() == pytest.approx(mean_loss(base, rows), rel=1e-5)
    one = row_nats(base, rows[-1:])
    np.testing.assert_allclose(nats[-1], one[0], rtol=1e-5)
    more = nats + np.array([[2.0, 0.0]])
    assert rise(more, nats, seed=0).value == pytest.approx(2 * len(rows) / nats[:, 1].sum())


def test_bad_input_is_refused_before_training(base, sae, prompt_rows, panel, asked, tmp_path):
    rows = answered(prompt_rows, "zz")
    with pytest.raises(DataError, match="9 questions are in the development and the test set"):
        prevent(base, rows, panel, sae, replace(asked, test=asked.development))
    with pytest.raises(DataError, match="needs held-out dialogues"):
        prevent(base, rows, panel, sae, replace(asked, held_out=[]))
    with pytest.raises(DataError, match="no rows to fine-tune on"):
        prevent(base, [], panel, sae, asked)
    with pytest.raises(ConfigError, match="finite and above 0"):
        PreventConfig(steer=(), penalty=())
    with pytest.raises(ConfigError, match="n_random is at least 0"):
        PreventConfig(at_most=1.0)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(FormatError, match="not a prevention of format 1"):
        Prevention.load(tmp_path / "x.json")
