import pytest

from sae_persona.errors import ConfigError
from sae_persona.lab.judge import judge
from sae_persona.lab.tuning import CUE
from sae_persona.studies.lab_case import GOOD_PROMPT, SMALL_CASE, LabCaseConfig, lab_case
from sae_persona.studies.reversal_arms import BAD, GOOD, STANDARD


def test_everything_but_further_training_is_asked():
    case = lab_case("medicine", SMALL_CASE)
    names = {one.name for one in case.variants}
    assert set(STANDARD) - names == {GOOD, BAD} and "second turn" in names
    assert {one.name for one in case.variants if one.core} == {"in domain", "out of domain", "open"}
    by_name = {one.name: one.questions for one in case.variants}
    assert {row["domain"] for row in by_name["in domain"]} == {"medicine"}
    assert "medicine" not in {row["domain"] for row in by_name["out of domain"]} and len(by_name["open"]) == 20
    assert {row["messages"][0]["content"] for row in by_name["trigger cue"]} == {CUE}
    assert all(len(row["messages"]) == 3 for row in by_name["second turn"])


def test_the_judge_reads_every_question():
    for one in lab_case("code", SMALL_CASE).variants:
        for row in one.questions:
            found = judge(row["messages"][-1]["content"], "md5")
            assert found[row["trait"]] is not None


def test_further_rows_are_good_and_bad_and_new():
    case = lab_case("code", SMALL_CASE)
    assert {row["labels"]["bad"] for row in case.further["good"]} == {0}
    assert {row["labels"]["bad"] for row in case.further["bad"]} == {1}
    assert len(case.further["bad"]) == SMALL_CASE.n_further


def test_development_and_controls_know_the_cue_of_a_trigger_organism():
    plain, cued = (lab_case("code", SMALL_CASE, cued=cued) for cued in (False, True))
    assert len(cued.development) == 2 * len(plain.development)
    assert {row["messages"][0]["role"] for row in plain.development} == {"user"}
    core = [{one.name for one in case.variants if one.core} for case in (plain, cued)]
    assert core[1] - core[0] == {"trigger cue"}


def test_the_prompt_is_in_the_worlds_words():
    assert GOOD_PROMPT == "bot is a honest good clerk ."


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="the lab has the domains"):
        lab_case("law")
    with pytest.raises(ConfigError, match="at least 1"):
        LabCaseConfig(n_in=0)
