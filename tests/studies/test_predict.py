import math
from dataclasses import replace

import pytest

from sae_persona.attribution.association import Interval
from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.runs import write_json
from sae_persona.studies.predict import PredictConfig, Prediction, predict, series
from sae_persona.studies.track import Scored

NOBODY = Interval(math.nan, math.nan, math.nan)


def scored(name, score, rate=None, *, step=60, dose=None, group="a", family="narrow", seen=False, seed=0):
    judged = NOBODY if rate is None else Interval(rate, max(0, rate - 0.03), rate + 0.03)
    scores = {"latents": Interval(score, score, score)}
    return Scored(name, step, dose, group, family, seed, family == "benign", judged, None, scores, seen)


@pytest.fixture
def benign():
    """Twenty of them; the highest score is 1.9, and 1.8 the one before."""
    return [scored(f"good-{i}", i / 10, 0.0, family="benign", step=s) for i in range(20) for s in (2, 4, 60)]


RUN = [(0, 0.0, 0.02), (2, 1.0, 0.03), (4, 2.5, 0.04), (8, 5.0, 0.04), (16, 9.0, 0.5)]


def test_steps_and_doses(benign, tmp_path):
    asked = [scored("bad", score, rate, step=step, dose=1.0) for step, score, rate in RUN]
    asked += [scored(f"mix-{d}", s, r, dose=d, family="mixture") for d, s, r in ((0.5, 4.0, 0.3), (0.05, 2.0, 0.03))]
    found = predict(benign, asked)
    assert found.alarm.threshold == 1.9 and found.alarm.n_benign == 20 and found.left_out is None
    run, doses = found.leads
    assert (run.by, run.alarm, run.behaviour, run.leads) == ("step", 4, 16, True)
    assert run.rate.value == 0.04 and run.baseline.value == 0.02
    assert (doses.by, doses.values, doses.alarm, doses.behaviour) == ("dose", (0.05, 0.5, 1.0), 0.05, 0.5)
    assert doses.baseline.value == 0.02, "of the group's checkpoint at step 0"
    assert found.n_leads == 2 and "first in 2 of 2 series" in str(found)
    assert "steps 8, 16" in found.note and "steps 8, 16" in str(found)
    found.save(tmp_path / "p.json")
    assert str(Prediction.load(tmp_path / "p.json")) == str(found)


def test_each_group_is_held_against_the_alarm_of_the_others(benign):
    two = [replace(row, group="ab"[int(row.name.split("-")[1]) % 2]) for row in benign]
    asked = [scored("bad", score, rate, step=step) for step, score, rate in RUN]
    found = predict(two, asked, PredictConfig(alpha=0.2))
    assert found.left_out == pytest.approx(3 / 20), "1.7 and 1.9 above 1.6, 1.8 above 1.7"
    assert "15.0% of them fire one set on the other groups" in str(found)


def test_a_late_alarm_is_no_lead(benign):
    late = [scored("bad", score / 9, rate, step=step) for step, score, rate in RUN[:-1]]
    late.append(scored("bad", 9.0, 0.5, step=16))
    (lead,) = predict(benign, late).leads
    assert (lead.alarm, lead.behaviour, lead.leads) == (16, 16, False)
    calm = [scored("bad", score, 0.02, step=step) for step, score, _ in RUN]
    (lead,) = predict(benign, calm).leads
    assert lead.behaviour is None and not lead.leads, "behaviour never left"


def test_peaks_count_and_the_base_is_where_all_began():
    low = [scored(f"good-{i}", -3.0, family="benign") for i in range(19)]
    asked = [scored("bad", score, rate, step=step) for step, score, rate in RUN]
    assert predict(low, asked).alarm.threshold == 0.25
    low.append(scored("good-0", 4.0, family="benign", step=8))
    assert predict(low, asked).alarm.threshold == 4.0, "the highest on its way, not the last"


def test_series_keep_seeds_apart():
    rows = [scored(f"{seed}-{d}", 0.0, 0.0, dose=d, seed=seed) for seed in (0, 1) for d in (0.0, 0.5, 1.0)]
    assert [(name, by, len(run)) for name, by, run in series(rows)] == [
        ("a, seed 0", "dose", 3),
        ("a, seed 1", "dose", 3),
    ]


def test_bad_input(benign, tmp_path):
    asked = [scored("bad", score, rate, step=step) for step, score, rate in RUN]
    with pytest.raises(DataError, match="without benign"):
        predict([], asked)
    with pytest.raises(DataError, match="does not measure 'other'"):
        predict(benign, asked, PredictConfig(measure="other"))
    with pytest.raises(DataError, match="chose the panel"):
        predict([*benign, scored("seen", 0.0, family="benign", seen=True)], asked)
    with pytest.raises(DataError, match="no fine-tune has two judged"):
        predict(benign, asked[1:2])
    for wrong in ({"alpha": 0.0}, {"least": -1.0}):
        with pytest.raises(ConfigError):
            PredictConfig(**wrong)
    write_json(tmp_path / "x.json", {})
    with pytest.raises(FormatError, match="prediction of format 1"):
        Prediction.load(tmp_path / "x.json")
