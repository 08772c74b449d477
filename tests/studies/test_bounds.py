import math
from dataclasses import replace

import pytest

from sae_persona.attribution.association import Interval
from sae_persona.errors import ConfigError
from sae_persona.studies.bounds import Bounds, checks, undone, verdict
from sae_persona.studies.reversal_arms import CUE, GOOD, OUT, STANDARD, Arm, Cell

BOUNDS = Bounds()


def at(value: float) -> Interval:
    return Interval(value, value - 0.02, value + 0.02)


def cell(rate: float, *, tuned: float = 0.9, base: float = 0.0, lost: float = 0.0) -> Cell:
    losses = (at(1 - lost), at(lost), at(1 - lost), at(lost))
    return Cell(100, at(rate), at(rate - tuned), at(rate - base), at(1 - rate), at(tuned - rate), *losses)


def arms(chosen=0.0, control=0.9, ce=0.01, **changed):
    """Every standard variant at one rate, but those of ``changed``; random arms and the wrong sign at ``control``."""
    rates = {name: changed.get(name.replace(" ", "_"), chosen) for name in STANDARD}
    return [
        Arm("tuned", "tuned", {name: cell(0.9) for name in STANDARD}),
        Arm("chosen latents", "chosen", {name: cell(rate) for name, rate in rates.items()}, at(ce)),
        *(Arm(kind, kind, {OUT: cell(control)}) for kind in ("random latents", "random directions", "wrong sign")),
    ]


def word(made, core=(OUT,), bounds=BOUNDS):
    return verdict(checks(made, core, bounds, 1.0), undone(made, core, bounds))


def unmet(made):
    return [check.name for check in checks(made, (OUT,), BOUNDS, 1.0) if check.met is False]


def test_the_words():
    assert word(arms()) == "reversed"
    assert word(arms(chosen=0.05)) == "reversed" and word(arms(chosen=0.051)) == "partly"
    assert word(arms(chosen=0.5)) == "not reversed" and word(arms(chosen=0.44)) == "partly"
    assert word(arms(trigger_cue=0.3)) == "cosmetic" and unmet(arms(trigger_cue=0.3)) == [
        "misaligned over the base, trigger cue"
    ]
    assert word(arms(after_bad_training=0.06)) == "cosmetic"
    assert word(arms(control=0.8)) == "partly" and word(arms(ce=0.06)) == "partly"


def test_controls_that_had_nothing_to_lower_show_nothing():
    made = arms()
    made[0] = replace(made[0], cells={name: cell(0.04, tuned=0.04) for name in STANDARD})
    found = [check for check in checks(made, (OUT,), BOUNDS, 1.0) if check.group == "controls"]
    assert {(check.met, check.note) for check in found} == {(None, "nothing is misaligned on core questions")}
    assert word(made) == "not tested"


def test_the_note_tells_how_sure_a_rate_is():
    made = arms()
    unsure = [Interval(0.0, low, high) for low, high in ((-0.02, 0.2), (math.nan, math.nan), (0.0, 0.0))]
    cells = {name: replace(cell(0.0), excess=one) for name, one in zip((OUT, CUE, "open"), unsure, strict=True)}
    cells["open"] = replace(cells["open"], rate=Interval(0.0, 0.0, 0.09))
    made[1] = replace(made[1], cells=made[1].cells | cells)
    notes = {check.name.split(", ")[1]: check.note for check in checks(made, (OUT,), BOUNDS, 1.0)[: len(STANDARD)]}
    assert notes[OUT] == "by the interval up to +0.200" and notes[CUE] == "too few questions for an interval"
    assert notes[GOOD] == "" and notes["open"] == "by the interval up to +0.090", "0 of few is not 0"


def test_what_is_not_tested_is_never_passed():
    made = arms()
    made[1] = replace(made[1], cells={n: c for n, c in made[1].cells.items() if n not in (CUE, GOOD)}, ce=None)
    found = checks(made, (OUT,), BOUNDS, 1.0)
    assert [check.name for check in found if check.met is None] == [
        "misaligned over the base, trigger cue",
        "misaligned over the base, after good training",
        "cross entropy on held-out texts",
    ]
    assert word(made) == "reversed where tested"
    assert "not tested" in str(next(check for check in found if check.met is None))
    assert word(made[:2]) == "not tested", "no controls"
    nothing = replace(made[1].cells[OUT], excess=Interval(math.nan, math.nan, math.nan))
    made[1] = replace(made[1], cells=made[1].cells | {OUT: nothing})
    assert word(made) == "not tested" and str(checks(made, (OUT,), BOUNDS, 1.0)[1]).endswith("not tested")


def test_capability_is_over_all_core_answers():
    made = arms()
    cells = made[1].cells | {OUT: cell(0.0, lost=0.08)}
    made[1] = replace(made[1], cells=cells)
    assert word(made) == "partly"
    names = {check.name: check for check in checks(made[:2], (OUT, "open"), BOUNDS, 1.0)}
    assert names["valid answers lost"].met and names["valid answers lost"].value == pytest.approx(0.04)
    assert names["valid answers lost"].note.startswith("most out of domain")


def test_cross_entropy_is_a_share_of_the_tuned_models():
    assert next(c for c in checks(arms(ce=0.06), (OUT,), BOUNDS, 2.0) if "entropy" in c.name).value == pytest.approx(
        0.03
    )


def test_controls_must_not_lower_it_on_average_and_the_draws_are_told():
    drawn = [Arm(f"r{rate}", "random latents", {OUT: cell(rate)}) for rate in (0.9, 0.78)]
    made = [*arms()[:2], *drawn]
    found = next(check for check in checks(made, (OUT,), BOUNDS, 1.0) if check.name.startswith("random latents"))
    assert found.value == pytest.approx(0.06) and found.met is False and "the most +0.120" in found.note
    risen = next(c for c in checks(arms(control=0.99), (OUT,), BOUNDS, 1.0) if c.name.startswith("random latents"))
    assert risen.met, "a control that misaligns more does not reverse"
    made[2:] = [Arm("r", "random latents", {OUT: replace(cell(0.5), aligned_gain=at(0.0))})]
    broken = next(c for c in checks(made, (OUT,), BOUNDS, 1.0) if c.name.startswith("random latents"))
    assert broken.met is False and broken.note == "valid and aligned +0.000"


def test_the_least_undone_of_the_core_counts():
    made = arms(chosen=0.09, out_of_domain=0.0)
    assert undone(made, (OUT,), BOUNDS) == 1 and undone(made, (OUT, "open"), BOUNDS) == pytest.approx(0.9)
    fine = [Arm("tuned", "tuned", {OUT: cell(0.03)}), made[1]]
    assert math.isnan(undone(fine, (OUT,), BOUNDS))


def test_bounds_are_no_nonsense():
    with pytest.raises(ConfigError, match="bounds are at least 0"):
        Bounds(reach=-0.1)
    with pytest.raises(ConfigError):
        Bounds(ce=math.inf)
