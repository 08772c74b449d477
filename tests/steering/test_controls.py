import numpy as np

from sae_persona.steering.controls import matched_latents


def test_matched_latents_fire_about_as_often_and_are_not_taken():
    rates = np.r_[0.0, np.geomspace(0.001, 0.5, 99)]
    picked = matched_latents(rates, {50, 51}, 50, 6, seed=0)
    assert len(set(picked)) == 6
    assert not {0, 50, 51} & set(picked)
    assert max(abs(i - 50) for i in picked) <= 14
    assert picked == matched_latents(rates, {50, 51}, 50, 6, seed=0) != matched_latents(rates, {50, 51}, 50, 6, seed=1)
