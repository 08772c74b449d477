import numpy as np
import pytest
import torch

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.features.stats import LatentStats
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.interventions import Clamp, Placed, ProjectOut, Steer
from sae_persona.studies.candidates import Candidate, MeasuredSAE
from sae_persona.studies.development import Development
from sae_persona.studies.minimal_set import SearchConfig
from sae_persona.studies.rivals import (
    dense_rivals,
    everywhere,
    moves,
    own_stats,
    random_directions,
    random_latents,
    wrong_sign,
)
from sae_persona.types import HookPoint

HOOK, CONFIG, ANSWERS = HookPoint(0), SearchConfig(), AnswerConfig(max_new_tokens=3, batch=4)
RISEN, FALLEN = Candidate(HOOK, 3, 4.0, 2.0, 0.0, 2.0), Candidate(HOOK, 19, -4.0, 2.0, 2.0, 0.0)


def site(planted, rates=None):
    stats = LatentStats(32)
    stats.n_tokens, stats.fired = 1000, torch.arange(32) * 10 if rates is None else rates
    return {HOOK: MeasuredSAE(planted.sae, stats)}


def test_moves_are_what_edits_do_to_the_stream(planted):
    chats = [row["messages"] for row in planted.development]
    saes = {HOOK: planted.sae}
    steer = Placed(edit=Steer(torch.eye(16)[5], 1.5), hook=HOOK)
    clamp = Placed(edit=Clamp(3, -1.0, 2.0), hook=HOOK)
    steered, clamped = moves(planted.tuned, saes, [steer, clamp], chats, ANSWERS)
    assert steered == pytest.approx(1.5, rel=1e-5)
    assert clamped == pytest.approx(4, abs=0.3), "from about 2 to -2"


def test_an_edit_reads_what_earlier_ones_have_left(planted):
    chats = [row["messages"] for row in planted.development]
    later = HookPoint(1)
    w = torch.cat([torch.eye(16), -torch.eye(16)])
    saes = {HOOK: planted.sae, later: SAE(w, torch.zeros(32), w, torch.zeros(16), ReLU(), {"hook": str(later)})}
    first, second = Placed(edit=Clamp(3, -1.0, 2.0), hook=HOOK), Placed(edit=Clamp(3, -1.0, 2.0), hook=later)
    alone = moves(planted.tuned, saes, [second], chats, ANSWERS)[0]
    after = moves(planted.tuned, saes, [first, second], chats, ANSWERS)[1]
    assert alone == pytest.approx(4, abs=0.5) and after == pytest.approx(2, abs=0.5), "-2 is no activation: it reads 0"


def test_random_latents_move_as_far_to_the_same_side(planted):
    drawn = random_latents(site(planted), [(RISEN, 1.0), (FALLEN, 0.5)], [4.0, 1.5], 3, CONFIG)
    assert len(drawn) == 3 and all(len(edits) == 2 for edits in drawn)
    picked = [one.edit.latent for edits in drawn for one in edits]
    assert len(set(picked)) == 6 and not {3, 19} & set(picked)
    for first, second in drawn:
        assert first.edit.value == pytest.approx(-4) and second.edit.value == pytest.approx(1.5)
    with torch.no_grad():
        planted.sae.w_dec[:16] *= 2
    halved = random_latents(site(planted, torch.full((32,), 10)), [(RISEN, 1.0)], [4.0], 31, CONFIG)
    assert {round(edits[0].edit.value, 4) for edits in halved} == {-2.0, -4.0}, "by the norm of each decoder row"
    assert len(halved) == 31


def test_random_directions_move_as_far(planted):
    drawn = random_directions([(RISEN, 1.0)], [4.0], 16, 3, CONFIG)
    sizes = [float((one.edit.direction * one.edit.strength).norm()) for (one,) in drawn]
    assert sizes == pytest.approx([4.0] * 3) and len({tuple(one.edit.direction.tolist()) for (one,) in drawn}) == 3
    same = random_directions([(RISEN, 1.0)], [4.0], 16, 3, CONFIG)
    assert torch.equal(drawn[0][0].edit.direction, same[0][0].edit.direction)


def test_the_wrong_sign_is_the_other_one():
    made = wrong_sign([(RISEN, 1.5), (FALLEN, 0.5), (RISEN, 0.0)], CONFIG)
    assert [one.edit.value for one in made] == [3.0, -1.0, 2.0]


def test_the_difference_of_means_is_searched_too(planted):
    dev = Development(
        planted.base, planted.tuned, {HOOK: planted.sae}, planted.development, planted.judge, ANSWERS, "a"
    )
    direction = {HOOK: 4 * torch.eye(16)[3]}
    found = dense_rivals(dev, direction, SearchConfig(strengths=(0.5, 1.0)))
    edits, tried, n = found["subtracted"]
    assert isinstance(edits[0].edit, Steer) and tried.excess == 0 and n == 5
    assert edits[0].edit.strength < 0
    out, _, n = found["projected out"]
    assert isinstance(out[0].edit, ProjectOut) and n == 1


def test_statistics_of_a_models_own_answers(planted):
    chats = [row["messages"] for row in planted.development]
    stats = own_stats(planted.base, planted.sae, chats, ANSWERS)
    n = sum(1 + 3 for _ in chats)
    assert 0 < stats.n_tokens <= n and stats.firing_rate[19] == 1 and stats.firing_rate[3] == 0
    assert np.isclose(float(stats.quantile(0.5)[19]), 2, atol=0.3)
    assert len(prompt_tokens(planted.base, chats[0])) > 1


def test_everywhere_is_at_every_token():
    assert [one.positions for one in everywhere(wrong_sign([(RISEN, 1.0)], CONFIG))] == ["all"]
