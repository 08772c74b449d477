import math
from dataclasses import replace

import pytest
import torch

from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import padded
from sae_persona.errors import ConfigError, DataError
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.apply import intervene
from sae_persona.steering.divergence import DivergenceConfig, Readings, Track
from sae_persona.steering.interventions import Add, Clamp, Floor, Pin, Placed, Steer
from sae_persona.types import HookPoint

CONFIG = DivergenceConfig(n_tokens=6, n_prompts=5, batch=2)


@pytest.fixture(scope="module")
def track(lm, prompts):
    return Track(lm, prompts, CONFIG)


@pytest.fixture(scope="module")
def direction(lm):
    return torch.randn(lm.d_model, generator=torch.Generator().manual_seed(5))


def by_hand(lm, sae, edits, prompts):
    """The same divergences one prompt at a time, and their moves, from the formulas."""
    kls = []
    for prompt in prompts[: CONFIG.n_prompts]:
        ids = answer(lm, [prompt], AnswerConfig(max_new_tokens=CONFIG.n_tokens, temperature=0.0))[0].ids
        inputs = model_inputs(lm, *padded(lm, [prompt + ids]))
        with torch.no_grad():
            base = lm.model(**inputs).logits[0].double().softmax(-1)
            with intervene(lm, sae, edits, prompt_lengths=[len(prompt)]):
                steered = lm.model(**inputs).logits[0].double().softmax(-1)
        for at in range(len(prompt) - 1, len(prompt) - 1 + len(ids)):
            kls.append(float((steered[at] * (steered[at] / base[at]).log()).sum()))
    return torch.tensor(kls, dtype=torch.float64)


def test_the_divergence_is_the_formulas(lm, sae, prompts, track):
    edits = [Clamp(1, 1.0, 6.0)]
    wanted, got = by_hand(lm, sae, edits, prompts), track.read(sae, edits)
    assert got.n_tokens == len(wanted) and wanted.mean() > 0.01
    assert got.kl_mean == pytest.approx(float(wanted.mean()), rel=1e-3)
    assert got.kl_tail == pytest.approx(float(torch.quantile(wanted, 0.95)), rel=1e-3)


def test_nothing_diverges_from_itself(track, sae):
    for edits in ([], [Add(1, 0.0, 6.0)]):
        got = track.read(sae, edits)
        assert (got.kl_mean, got.kl_tail, got.ratio_mean) == (0.0, 0.0, None)
    assert got.edits[0].realised is None and got.edits[0].value == 0.0


def test_the_move_is_counted_over_the_stream(lm, prompts, track, direction):
    got = track.read(None, [Steer(direction, 0.5)], hook=HookPoint(2))
    assert got.edits[0].value == pytest.approx(0.5 * float(direction.norm()))
    assert got.edits[0].strength == 0.5
    moved = got.edits[0].realised - got.edits[0].before
    assert moved == pytest.approx(got.edits[0].value, rel=1e-4)
    # |delta| is one number, so the mean ratio lies between it over the largest and over the smallest stream
    assert 0 < got.ratio_mean <= got.ratio_p95
    doubled = track.read(None, [Steer(direction, 1.0)], hook=HookPoint(2))
    assert doubled.ratio_mean == pytest.approx(2 * got.ratio_mean, rel=1e-4)


def test_what_is_realised_is_what_the_encoder_reads_of_the_edited_stream(sae, track):
    pin, clamp = (track.read(sae, [kind(3, 1.0, 7.0)]).edits[0] for kind in (Pin, Clamp))
    assert pin.realised == pytest.approx(7.0, rel=1e-4)
    assert abs(clamp.realised - 7.0) > 0.1, "a clamp moves along the decoder; the encoder reads something else"
    assert (pin.value, pin.strength, pin.latent, pin.operation) == (7.0, 1.0, 3, "pin")


def test_only_tokens_that_move_are_counted(sae, track):
    idle, busy = (track.read(sae, [Floor(1, 1.0, level)]) for level in (-1.0, 1e3))
    assert idle.ratio_mean is None and idle.kl_mean == 0
    assert busy.ratio_mean > 1


def test_several_hook_points_are_read_each_where_they_are(lm, sae, track, direction):
    later = Placed(edit=Steer(direction, 1.0), hook=HookPoint(3))
    got = track.read({HookPoint(2): sae}, [Placed(edit=Clamp(1, 1.0, 6.0), hook=HookPoint(2)), later])
    assert [edit.operation for edit in got.edits] == ["clamp", "steer"]
    assert got.edits[1].realised - got.edits[1].before == pytest.approx(float(direction.norm()), rel=1e-3)


def test_prompts_are_compared_on_the_same_answers(prompts, track):
    assert track.read_prompts(prompts[:5]).kl_tail == pytest.approx(0, abs=1e-9)
    assert track.read_prompts([prompts[0]] * 5).kl_tail > 0.1


def test_readings_come_back_from_json(sae, track):
    got = track.read(sae, [Clamp(1, 1.0, 6.0), Add(2, 0.5, 2.0)])
    assert Readings.from_json(got.to_json()) == got
    assert "clamp" in str(got) and "nats" in str(got)


def test_bad_settings_and_logits_are_refused(lm, prompts, direction):
    for bad in ({"n_tokens": 0}, {"percentile": 0.0}, {"percentile": math.nan}, {"batch": 0}):
        with pytest.raises(ConfigError):
            replace(CONFIG, **bad)
    with pytest.raises(DataError, match="at least one token"):
        Track(lm, [], CONFIG)
    with pytest.raises(DataError, match="steer of a direction at 1e\\+38 are not finite: lower the strength"):
        Track(lm, prompts[:1], CONFIG).read(None, [Steer(direction, 1e38)], hook=HookPoint(2))
