import numpy as np
import pytest
import torch

from sae_persona.errors import DataError
from sae_persona.studies import shift
from sae_persona.studies.shift import mean_interval, paired_shift

CONFIG = {"permutations": 200, "resamples": 200, "seed": 0}


def test_a_planted_shift_is_found_and_noise_is_not():
    torch.manual_seed(0)
    d = torch.randn(60, 40)
    d[:, 7] += 2
    found = paired_shift(d, **CONFIG)
    assert found.z.argmax() == 7 and found.p_max_t[7] == pytest.approx(1 / 201)
    assert (np.delete(found.p_max_t, 7) > 0.05).mean() > 0.9
    assert found.mean.low[7] < found.mean.value[7] < found.mean.high[7]
    assert found.mean.low[7] > 1.5 and found.mean.value[7] == pytest.approx(d[:, 7].mean().item())
    assert (found.p_max_t >= found.p - 1e-12).all()


def test_max_t_holds_its_level():
    """In 5 % of data sets without any shift the smallest p is at 5 % or below; 4 standard errors of 100 sets."""
    torch.manual_seed(1)
    smallest = [
        paired_shift(torch.randn(30, 20), permutations=99, resamples=2, seed=i).p_max_t.min() for i in range(100)
    ]
    assert np.mean(np.array(smallest) <= 0.05) < 0.05 + 4 * (0.05 * 0.95 / 100) ** 0.5


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(2)
    d = torch.randn(20, 11)
    whole = paired_shift(d, **CONFIG)
    monkeypatch.setattr(shift, "_ENTRIES", 3 * 200)
    parts = paired_shift(d, **CONFIG)
    for one, other in ((whole.p_max_t, parts.p_max_t), (whole.mean.low, parts.mean.low), (whole.z, parts.z)):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_a_measure_that_never_moves_is_no_finding():
    d = torch.zeros(10, 2)
    d[:, 1] = 1
    found = paired_shift(d, **CONFIG)
    assert found.z[0] == 0 and found.p[0] == 1 and found.p_max_t[0] == 1


@pytest.mark.parametrize("d", [torch.ones(1, 3), torch.tensor([[1.0], [float("nan")]])])
def test_bad_input(d):
    with pytest.raises(DataError, match="two prompts or more and finite"):
        paired_shift(d, **CONFIG)


def test_mean_interval_covers():
    generator = np.random.default_rng(0)
    hits = 0
    for i in range(100):
        found = mean_interval(generator.normal(1, 2, 50), resamples=300, seed=i)
        hits += found.low <= 1 <= found.high
    assert 85 <= hits <= 100
