import numpy as np
import pytest

from sae_persona.errors import ConfigError, DataError
from sae_persona.studies.alarm import Alarm, left_out_rate


def test_threshold_is_the_conformal_quantile():
    alarm = Alarm.of("latents", [float(i) for i in range(39, 0, -1)], 0.05)
    assert alarm.threshold == 38 and alarm.n_benign == 39 and alarm.bound == pytest.approx(2 / 40)
    assert alarm.fires(38.5) and not alarm.fires(38)
    assert Alarm.of("latents", [0.0] * 19, 0.05, least=0.5).threshold == 0.5
    assert "above +38.00" in str(alarm)


def test_false_alarms_are_as_rare_as_promised():
    """Over draws of 19 benign fine-tunes and a further one; 4 standard errors of 4000 draws."""
    generator = np.random.default_rng(0)
    draws = generator.standard_cauchy((4000, 20))
    rate = np.mean([Alarm.of("m", row[:19].tolist(), 0.05).fires(row[19]) for row in draws])
    assert abs(rate - 0.05) < 4 * (0.05 * 0.95 / 4000) ** 0.5


def test_upper_bound_covers_in_19_of_20():
    """The rate of a threshold on uniform scores is one minus the threshold."""
    generator = np.random.default_rng(1)
    alarms = [Alarm.of("m", generator.random(40).tolist(), 0.05) for _ in range(1000)]
    covered = np.mean([1 - alarm.threshold <= alarm.upper for alarm in alarms])
    assert abs(covered - 0.95) < 4 * (0.05 * 0.95 / 1000) ** 0.5


def test_left_out():
    scores, groups = [float(i) for i in range(40)], ["a"] * 20 + ["b"] * 20
    assert left_out_rate("m", scores, groups, 0.05) == 0.5, "all of the higher group, none of the other"
    mixed = ["a", "b"] * 20
    assert left_out_rate("m", scores, mixed, 0.05) == pytest.approx(1 / 40)
    assert left_out_rate("m", scores, ["a"] * 40, 0.05) is None, "no other group"
    assert left_out_rate("m", scores[:20], mixed[:20], 0.05) is None, "10 are too few"


@pytest.mark.parametrize(
    ("benign", "alpha", "error", "said"),
    [
        ([], 0.05, DataError, "without benign fine-tunes there is no threshold"),
        ([0.0] * 18, 0.05, DataError, "18 benign fine-tunes are too few: .* needs 19"),
        ([float("nan")] * 19, 0.05, DataError, "not all finite"),
        ([0.0] * 19, 1.5, ConfigError, "alpha"),
    ],
)
def test_bad_input(benign, alpha, error, said):
    with pytest.raises(error, match=said):
        Alarm.of("m", benign, alpha)
