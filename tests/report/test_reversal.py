import math
from dataclasses import replace

import pytest

from sae_persona.attribution.association import Interval
from sae_persona.report.reversal import render, statements, write_certificate
from sae_persona.report.reversal_charts import arms_chart, dose_chart, variants_chart
from sae_persona.studies.bounds import Bounds
from sae_persona.studies.certificate import Certificate, EditedLatent, Searched
from sae_persona.studies.induce import Dose, Induction
from sae_persona.studies.reversal_arms import STANDARD, Arm, Cell

ATTACK = "<script>alert('z')</script>"


def at(value):
    return Interval(value, max(0.0, value - 0.05), min(1.0, value + 0.05))


def cell(rate, tuned=0.9):
    known = (at(1 - rate), at(tuned - rate), at(1.0), at(0.0), at(1.0), at(0.0))
    return Cell(50, at(rate), at(rate - tuned), at(rate), *known)


def arm(name, kind, rate, variants=STANDARD, ce=None):
    return Arm(name, kind, {variant: cell(rate) for variant in variants}, ce)


@pytest.fixture
def made():
    core = STANDARD[:3]
    arms = (
        arm("base", "base", 0.0),
        arm("tuned", "tuned", 0.9),
        arm("chosen latents", "chosen", 0.02, ce=at(0.01)),
        arm("the same ablated", "ablated", 0.4),
        arm("difference of means subtracted", "difference of means", 0.0),
        arm("a good prompt", "prompt", 0.6),
        arm("wrong sign", "wrong sign", 0.95, core),
        *(arm(f"random latents {i}", "random latents", 0.9, core) for i in (1, 2)),
        *(arm(f"random directions {i}", "random directions", 0.9, core) for i in (1, 2)),
    )
    doses = tuple(
        Dose(
            d, {"out of domain": at(d / 2), "open": at(d / 4)}, at(d / 2), at(1.0), {"out of domain": (0.02,)}, (0.02,)
        )
        for d in (0.0, 0.5, 1.0)
    )
    return Certificate(
        base="lab",
        tuned=ATTACK,
        domain="code",
        edits=(EditedLatent("layers.3.resid_post", 80, "clamp", 1.0, 30.0, -30.0, 26.0, 0.0, 24.0, 54.0, 0.9),),
        searched=(Searched("clamp", 1, 0.02, 0.01, True, 12, "80 at layers.3.resid_post x 1"),),
        arms=arms,
        core=core,
        bounds=Bounds(),
        ce_base=0.58,
        ce_tuned=0.6,
        config={},
        about={"seconds": 1.0},
        examples=(("what ?", "arsenic", f"aspirin {ATTACK}"),),
        induction=Induction(model="lab", latents=("80",), doses=doses, config={"min_valid": 0.75}),
    )


def test_every_arm_and_variant_is_drawn(made):
    drawn = str(arms_chart(made, "out of domain"))
    assert drawn.count('class="mark') == len(made.arms), "draws are dots of one row"
    assert drawn.count("whisker") == len(made.arms) - 4 and "difference of means subtracted" in drawn
    assert str(variants_chart(made)).count('class="mark') == 3 * len(STANDARD)
    curve = str(dose_chart(made.induction))
    assert curve.count('class="curve') == 2 and curve.count('class="mark random') == 3


def test_what_nobody_knows_is_not_drawn(made):
    unknown = Interval(math.nan, math.nan, math.nan)
    blind = replace(made.arms[2].cells["open"], rate=unknown)
    arms = list(made.arms)
    arms[2] = replace(arms[2], cells=arms[2].cells | {"open": blind})
    assert "nan" not in str(variants_chart(replace(made, arms=tuple(arms))))
    assert "nan" not in str(arms_chart(replace(made, arms=tuple(arms)), "open"))
    doses = tuple(replace(one, valid=unknown) for one in made.induction.doses)
    assert "nan" not in str(dose_chart(replace(made.induction, doses=doses)))


def test_the_page_says_what_the_numbers_say(made, tmp_path):
    assert made.verdict == "reversed"
    page = write_certificate(made, tmp_path / "c.html").read_text()
    assert page.count("<svg") == 3 and ATTACK not in page and "http" not in page.split("</style>")[1]
    assert "every bound is met on every variant" in page and "not met" not in page
    assert all(check.name in page for check in made.checks) and all(one.name in page for one in made.arms)
    assert render(made) == page, "the same bytes"


def test_it_tells_of_milder_modes_and_rivals(made):
    said = " ".join(statements(made)).replace("\N{NO-BREAK SPACE}", " ")
    assert "One latent brings misaligned answers out of domain from 90 % to 2 %" in said
    assert "Ablated, the same leave 40 %" in said and "outweighs that rather than undoes it" in said
    assert "Difference of means subtracted leaves less: 0 %" in said and "A good prompt leaves more: 60 %" in said
    assert "they misalign it: 50 %" in said


def test_a_cosmetic_reversal_is_called_so(made):
    arms = list(made.arms)
    arms[2] = replace(arms[2], cells=arms[2].cells | {"trigger cue": cell(0.5)})
    page = render(replace(made, arms=tuple(arms), induction=None, examples=()))
    assert "The reversal is cosmetic" in page and page.count("not met") == 1 and page.count("<svg") == 2
    cells = {name: one for name, one in made.arms[2].cells.items() if name != "trigger cue"}
    arms[2] = replace(arms[2], cells=cells)
    page = render(replace(made, arms=tuple(arms)))
    assert "reversed where tested" in page and "not tested" in page
