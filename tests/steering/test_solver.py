import numpy as np
import pytest

from sae_persona.errors import ConfigError
from sae_persona.steering.solver import LocalModel, Targets, plan, positive

LOW = np.zeros(2)
HIGH = np.array([2.0, 4.0])


def model(jacobian, *, hessian=((2.0, 0.0), (0.0, 1.0)), rates=(0.5, 0.5), at=(1.0, 1.0)):
    return LocalModel(
        traits=("formal", "cheerful"), at=np.array(at), rates=np.array(rates), jacobian=np.array(jacobian),
        hessian=np.array(hessian),
    )  # fmt: skip


def targets(**at_least):
    return Targets(at_least=at_least, at_most={})


def grid(m, wanted, n=201):
    """The cheapest strengths on a grid: what the program must match."""
    best = None
    for a in np.linspace(0, HIGH[0], n):
        for b in np.linspace(0, HIGH[1], n):
            s = np.array([a, b])
            if wanted.shortfall(m.predict(s)) <= 1e-9 and (best is None or m.divergence(s) < m.divergence(best)):
                best = s
    return best


@pytest.mark.parametrize("jacobian", [[[0.4, 0.0], [0.0, 0.3]], [[0.4, -0.1], [-0.15, 0.3]], [[0.3, 0.2], [0.1, 0.2]]])
def test_the_cheapest_strengths_that_meet_all_targets(jacobian):
    m, wanted = model(jacobian), targets(formal=0.6, cheerful=0.7)
    got, best = plan(m, wanted, LOW, HIGH), grid(m, wanted)
    assert got.feasible and got.shortfall == 0
    assert wanted.shortfall(got.predicted) <= 1e-6
    assert got.divergence <= m.divergence(best) + 1e-6
    assert got.divergence == pytest.approx(m.divergence(best), rel=0.05)


def test_one_edit_that_does_both_is_used_alone():
    got = plan(model([[0.4, 0.0], [0.4, 0.0]]), targets(formal=0.5, cheerful=0.5), LOW, HIGH)
    assert got.strengths == pytest.approx([1.0, 0.0], abs=1e-5)


def test_what_cannot_be_reached_is_said_with_the_numbers():
    """Each edit works as much against the other trait: formal 0.9 and cheerful 0.9 add up to more than there is."""
    m = model([[0.4, -0.4], [-0.4, 0.4]])
    got = plan(m, targets(formal=0.9, cheerful=0.9), LOW, HIGH)
    assert not got.feasible
    assert got.shortfall == pytest.approx(0.4), "their sum is 1 wherever the strengths are"
    assert sum(got.predicted.values()) == pytest.approx(1.0)
    assert got.reachable == pytest.approx({"formal >= 0.9": 0.5 + 0.4 * 2, "cheerful >= 0.9": 0.5 + 0.4 * 4})
    alone = plan(m, targets(formal=0.9), LOW, HIGH)
    assert alone.feasible and alone.strengths == pytest.approx([1.0, 0.0], abs=1e-5)


def test_targets_may_be_ceilings():
    m = model([[0.4, 0.0], [0.2, -0.3]])
    wanted = Targets(at_least={"formal": 0.7}, at_most={"cheerful": 0.3})
    got = plan(m, wanted, LOW, HIGH)
    assert got.feasible and got.predicted["formal"] >= 0.7 - 1e-6 and got.predicted["cheerful"] <= 0.3 + 1e-6
    assert got.reachable["cheerful <= 0.3"] == pytest.approx(0.5 - 0.2 + 0.3 - 4 * 0.3)


def test_strengths_stay_between_their_bounds():
    m, wanted = model([[0.4, 0.0], [0.0, 0.3]]), targets(formal=0.6)
    free, kept = plan(m, wanted, LOW, HIGH), plan(m, wanted, np.array([1.5, 0.25]), np.array([1.75, 0.5]))
    assert free.strengths == pytest.approx([1.25, 0.0], abs=1e-5)
    assert kept.feasible and kept.strengths == pytest.approx([1.5, 0.25], abs=1e-5)
    short = plan(m, wanted, LOW, np.array([1.0, 0.0]))
    assert not short.feasible and short.shortfall == pytest.approx(0.1)


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="at least one target"):
        Targets(at_least={}, at_most={})
    for rate in (float("nan"), 1.5, -0.1):
        with pytest.raises(ConfigError, match="a rate from 0 to 1"):
            targets(formal=rate)
    with pytest.raises(ConfigError, match="cannot be at least 0.9 and at most 0.5"):
        Targets(at_least={"formal": 0.9}, at_most={"formal": 0.5})
    with pytest.raises(ConfigError, match="no trait toxic was measured: there are formal, cheerful"):
        plan(model([[1.0, 0.0], [0.0, 1.0]]), targets(toxic=0.5), LOW, HIGH)


def test_noise_below_zero_is_cut_off():
    raw = np.array([[1.0, 3.0], [3.0, 1.0]])
    values = np.linalg.eigvalsh(positive(raw))
    assert values == pytest.approx([4e-6, 4.0])
    good = np.array([[2.0, 0.5], [0.5, 1.0]])
    assert positive(good) == pytest.approx(good)
