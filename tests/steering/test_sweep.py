import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.lab import corpora
from sae_persona.lab.judge import judge
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.arms import Sweep
from sae_persona.steering.dial import DialConfig, OutOfReach
from sae_persona.steering.divergence import DivergenceConfig
from sae_persona.steering.side_effects import HeldOut
from sae_persona.steering.sweep import Candidate, LeftOut, SweepConfig, _equal_cost, choose, sweep

CONFIG = SweepConfig(
    strengths=(0.5, 1.0, 2.0),
    dense_strengths=(0.5, 1.0),
    positions="pre",
    n_random=2,
    answers=AnswerConfig(seed=0),
)


def chats(part, n=30):
    return [row["messages"] for row in corpora.question_rows("formal", n, part)]


@pytest.fixture(scope="module")
def direction(lm):
    """Formal minus informal at the colon, by hand: what a planted latent should find."""
    from sae_persona.activations.dialogues import Dialogue, tokenize
    from sae_persona.activations.harvest import harvest
    from sae_persona.types import HookPoint

    rows = [Dialogue.from_row(row, "") for row in corpora.labelled(200, "train")]
    tokens = [tokenize(lm, row) for row in rows]
    x = torch.stack([acts[t.answers[-1].pre] for t, acts in harvest(lm, HookPoint(3), tokens, 32)])
    formal = torch.tensor([row.labels["formal"] > 0 for row in rows])
    return x[formal].mean(0) - x[~formal].mean(0)


@pytest.fixture(scope="module")
def planted(lm, direction):
    """An SAE whose latent 1 is the formal direction and whose other latents are noise."""
    g = torch.Generator().manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(8, lm.d_model, generator=g), dim=1)
    w[1] = direction / direction.norm()
    metadata = {"hook": "layers.3.resid_post", "model": "lab"}
    return SAE(w, torch.zeros(8), w, torch.zeros(lm.d_model), ReLU(), metadata)


@pytest.fixture(scope="module")
def swept(lm, planted, direction):
    unit = float(direction.norm())
    return sweep(
        lm,
        planted,
        "formal",
        candidates=[Candidate(latent=5, unit=unit), Candidate(latent=1, unit=unit)],
        matched=lambda latent: [2, 3, 4],
        direction=direction,
        development=chats("train"),
        test=chats("held_out"),
        judge=judge,
        persona_prompt=corpora.persona_prompt("formal"),
        held_out=HeldOut(lm, [{"messages": row["messages"]} for row in corpora.corpus(3)]),
        config=CONFIG,
    )


def test_the_planted_latent_is_chosen_and_moves_its_trait(swept):
    assert swept.latent == 1
    assert swept.chosen.gain.low > 0.3
    assert swept.chosen.cost.value < 2
    assert all(abs(arm.gain.value) < 0.2 for arm in swept.randoms)
    assert swept.arm("prompt").rate.value > 0.5


def test_every_arm_is_there_on_its_own_questions(swept):
    counted = {}
    for arm in swept.arms:
        counted[arm.part, arm.kind] = counted.get((arm.part, arm.kind), 0) + 1
    assert counted.pop(("development", "difference of means")) >= 2
    assert counted == {
        ("development", "baseline"): 1,
        ("development", "latent"): 6,
        ("test", "baseline"): 1,
        ("test", "latent"): 3,
        ("test", "wrong sign"): 1,
        ("test", "random"): 2,
        ("test", "difference of means"): 1,
        ("test", "prompt"): 1,
    }


def test_the_strength_is_the_cheapest_of_the_best_affordable_ones_on_development(swept):
    tried = [arm for arm in swept.arms if arm.part == "development" and arm.kind == "latent"]
    affordable = [arm for arm in tried if arm.cost.value <= CONFIG.max_cost]
    good = [arm for arm in affordable if arm.rate.value >= max(a.rate.value for a in affordable) - CONFIG.slack]
    cheapest = min(good, key=lambda arm: arm.cost.value)
    assert (swept.latent, swept.strength) == (cheapest.latent, cheapest.strength)
    assert 0 < len(good) < len(tried)


def test_the_baseline_gains_and_costs_nothing(swept):
    base = swept.arm("baseline")
    assert base.gain.value == 0
    assert base.cost == pytest.approx((1, 1, 1))
    assert base.perplexity > 1
    assert base.valid.value > 0.9


def test_a_file_holds_all_of_it(swept, tmp_path):
    swept.save(tmp_path / "formal.json")
    loaded = Sweep.load(tmp_path / "formal.json")
    assert loaded.to_json() == swept.to_json()
    assert loaded.chosen.rate == swept.chosen.rate
    (tmp_path / "other.json").write_text('{"format": 9}')
    with pytest.raises(FormatError, match="not a sweep of format 2"):
        Sweep.load(tmp_path / "other.json")


def test_it_prints_as_a_table(swept):
    text = str(swept)
    assert "formal: latent 1 clamped to" in text
    assert text.count("random") == 2
    assert " *" in text


def test_equal_cost_interpolates_between_the_strengths_tried(swept):
    dense = [arm for arm in swept.arms if arm.part == "development" and arm.kind == "difference of means"][:2]
    costs = [math.log(arm.cost.value) for arm in dense]
    middle = type("Arm", (), {"cost": type("C", (), {"value": math.exp(np.mean(costs))})})
    assert _equal_cost(dense, middle) == pytest.approx(0.75, abs=0.01)
    beyond = type("Arm", (), {"cost": type("C", (), {"value": 1e9})})
    assert _equal_cost(dense, beyond) == 1.0


def mute(lm):
    """The same model with a chat template that drops system messages."""
    tokenizer = copy.copy(lm.tokenizer)
    tokenizer.chat_template = "<s>{% for m in messages if m.role == 'user' %} user : {{ m.content }}{% endfor %} bot :"
    return LM(lm.model, tokenizer, lm.blocks, lm.blocks_path, lm.name)


def shouted(some):
    """The same questions in other letters and after other words."""
    return [
        [{"role": "assistant", "content": "hi"}, {"role": "user", "content": chat[-1]["content"].upper() + " "}]
        for chat in some
    ]


def test_what_cannot_be_swept_is_refused(lm, planted, direction):
    given = {
        "candidates": [Candidate(latent=1, unit=1.0)],
        "matched": lambda latent: [],
        "direction": direction,
        "development": chats("train", 3),
        "test": chats("held_out", 3),
        "judge": judge,
    }
    for changed, error, message in (
        ({"candidates": []}, ConfigError, "no latent to clamp for formal"),
        ({"test": []}, DataError, "the test set has no questions"),
        ({"test": chats("train", 3)}, DataError, "questions are in the development and the test set"),
        ({"test": shouted(chats("train", 3)[:1])}, DataError, "1 question is in the development and the test set"),
        ({"test": [[{"role": "assistant", "content": "hi"}]]}, DataError, "ends with a user's message"),
    ):
        with pytest.raises(error, match=message):
            sweep(lm, planted, "formal", **{**given, **changed})
    with pytest.raises(DataError, match="the chat template of lab drops system messages"):
        sweep(mute(lm), planted, "formal", persona_prompt="bot is a formal clerk .", **given)
    with pytest.raises(DataError, match="the judge never scores pirate"):
        sweep(lm, planted, "pirate", **given)
    for bad, message in (
        ({"max_cost": 1.0}, "max_cost is a multiple above 1"),
        ({"strengths": (1.0, math.nan)}, "strengths are finite and above 0"),
        ({"slack": -1.0}, "slack lies between 0 and 1"),
        ({"min_valid": math.nan}, "min_valid lies between 0 and 1"),
        ({"pick": "best"}, "pick is rate, dose or kl"),
    ):
        with pytest.raises(ConfigError, match=message):
            SweepConfig(**bad)


def test_the_dense_baseline_is_carried_to_the_latents_cost(swept):
    latent = swept.arm("latent", part="development", strength=swept.strength)
    tried = [arm for arm in swept.arms if arm.part == "development" and arm.kind == "difference of means"]
    assert max(arm.cost.value for arm in tried) >= latent.cost.value
    assert [arm.strength for arm in tried] == sorted(arm.strength for arm in tried)


def test_arms_say_how_many_questions_they_asked(swept):
    assert {arm.n for arm in swept.arms} == {30}
    for part, chats_of in (("development", "train"), ("test", "held_out")):
        wanted = len({str(chat) for chat in chats(chats_of)})
        assert {arm.n_questions for arm in swept.arms if arm.part == part} == {wanted}


def test_every_arm_but_the_baseline_says_how_strong_it_is(swept):
    for arm in swept.arms:
        assert (arm.readings is None) == (arm.kind == "baseline")
        assert (arm.ce is None) == (arm.part == "development" or arm.kind in ("baseline", "prompt"))
    edit = swept.chosen.readings.edits[0]
    assert (edit.latent, edit.strength) == (1, swept.strength)
    assert edit.value == pytest.approx(swept.strength * swept.unit)
    assert edit.realised == pytest.approx(edit.value, rel=1e-3), "this SAE reads what it writes"
    assert swept.chosen.readings.kl_tail > max(arm.readings.kl_tail for arm in swept.randoms) / 4
    assert swept.chosen.ce.low > 0
    assert swept.arm("prompt").readings.edits == () and swept.arm("prompt").readings.kl_mean > 0


def test_the_score_needs_trait_and_sense(swept):
    assert swept.arm("baseline").score.value < 0.3 < swept.chosen.score.value <= 2
    assert swept.chosen.score.low <= swept.chosen.score.value <= swept.chosen.score.high


def test_the_wrong_sign_does_not_do_it(swept):
    wrong = swept.arm("wrong sign")
    assert wrong.strength == -swept.strength and wrong.latent == swept.latent
    assert wrong.readings.edits[0].value == pytest.approx(-swept.strength * swept.unit)
    assert wrong.rate.value < 0.1


def test_the_strongest_inside_the_bounds(swept):
    tried = [arm for arm in swept.arms if arm.part == "development" and arm.kind == "latent"]
    assert max(arm.cost.value for arm in tried) < 1e6

    def chosen(**bounds):
        return choose(tried, replace(CONFIG, pick="dose", **bounds))

    loose = chosen(max_cost=1e6, min_valid=0.0)
    assert (loose.latent, loose.strength) == (1, 2.0)
    costs = {arm.strength: arm.cost.value for arm in tried if arm.latent == 1}
    tight = chosen(max_cost=max(1.0001, costs[1.0]), min_valid=0.0)
    assert tight.cost.value <= max(1.0001, costs[1.0]) and tight.strength < 2.0
    worst = min(arm.valid.value for arm in tried)
    assert worst < 1
    kept = chosen(max_cost=1e6, min_valid=worst + 1e-6)
    assert kept.valid.value > worst


@pytest.fixture(scope="module")
def dialled(lm, planted, direction):
    config = replace(
        CONFIG, pick="kl", strengths=(1.0,), n_random=1, max_cost=9.0,
        dial=DialConfig(budget=0.5, reading=DivergenceConfig(n_tokens=10, n_prompts=10)),
    )  # fmt: skip
    with pytest.warns(LeftOut, match="latent 5 is left out: no strength up to 16 reaches 0.5 nats"):
        return sweep(
            lm,
            planted,
            "formal",
            candidates=[Candidate(latent=5, unit=1e-3), Candidate(latent=1, unit=float(direction.norm()))],
            matched=lambda latent: [2],
            direction=direction,
            development=chats("train", 10),
            test=chats("held_out", 10),
            judge=judge,
            config=config,
        )


def test_arms_are_dialled_to_one_divergence(dialled):
    """On the development questions; the test questions read what they read."""
    dev = [arm for arm in dialled.arms if arm.part == "development" and arm.kind != "baseline"]
    assert [arm.kind for arm in dev] == ["latent", "difference of means"]
    for arm in dev:
        assert arm.readings.kl_tail == pytest.approx(0.5, rel=0.06), arm.kind
    assert dialled.strength == dev[0].strength != 1.0
    assert [arm.strength for arm in dialled.arms if arm.kind == "latent" and arm.part == "test"] == sorted(
        {1.0, dialled.strength}
    )
    assert dialled.chosen.strength == dialled.strength
    assert dialled.randoms[0].strength not in (1.0, dialled.strength)


def test_candidates_that_none_reaches_are_refused(lm, planted, direction):
    config = replace(CONFIG, pick="kl", dial=DialConfig(reading=DivergenceConfig(n_tokens=2, n_prompts=2)))
    with pytest.warns(LeftOut), pytest.raises(OutOfReach, match="no strength up to 16 reaches 1 nats"):
        sweep(
            lm, planted, "formal", candidates=[Candidate(latent=5, unit=1e-3)], matched=lambda latent: [],
            direction=direction, development=chats("train", 3), test=chats("held_out", 3), judge=judge, config=config,
        )  # fmt: skip
