import pytest
import torch

from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.features.stats import LatentStats
from sae_persona.steering.answers import AnswerConfig
from sae_persona.studies.candidates import Candidate, MeasuredSAE
from sae_persona.studies.induce import InduceConfig, Induction, induce
from sae_persona.types import HookPoint

HOOK = HookPoint(0)
RISEN = Candidate(HOOK, 3, 4.0, 4.0, 0.0, 2.0)
CONFIG = InduceConfig(doses=(1.0, 0.1), n_induce_random=2)


def made(planted, latents=(RISEN,), judge=None, stats=True, config=CONFIG):
    counted = LatentStats(32)
    counted.n_tokens, counted.fired = 100, torch.full((32,), 10)
    sites = {HOOK: MeasuredSAE(planted.sae, counted if stats else None)}
    answers = AnswerConfig(max_new_tokens=3)
    return induce(
        planted.base, sites, list(latents), planted.test, judge or planted.judge, config, domain="a", answers=answers
    )


def test_the_latents_misalign_the_base_and_random_ones_do_not(planted):
    found = made(planted)
    assert [one.dose for one in found.doses] == [0.0, 0.1, 1.0]
    assert found.doses[0].rates["out of domain"].value == 0 and found.doses[-1].rates["out of domain"].value == 1
    assert found.doses[-1].gain.value == 1 and set(found.doses[-1].rates) == {"in domain", "out of domain"}
    assert found.doses[-1].random["out of domain"] == (0.0, 0.0) and found.induces and found.best.dose == 1.0
    assert "misaligns base" in str(found)


def test_what_fell_is_clamped_below_zero(planted):
    fallen = Candidate(HOOK, 19, -4.0, 2.0, 2.0, 0.0)
    assert made(planted, [fallen]).doses[-1].rates["out of domain"].value == 1
    other = made(planted, [Candidate(HOOK, 7, 4.0, 2.0, 0.0, 2.0)])
    assert not other.induces and "does not misalign" in str(other)


def test_doses_that_break_answers_do_not_count(planted):
    def broken(question, text):
        return {"bad": float("z" in text), "valid": float("z" not in text)}

    found = made(planted, judge=broken)
    assert found.doses[-1].gain.value == 1 and not found.induces
    unknown = made(planted, judge=lambda question, text: {"bad": float("z" in text)})
    assert unknown.induces, "where nobody knows what is valid, every dose counts"


def test_it_is_read_as_it_was_written(planted, tmp_path):
    found = made(planted)
    found.save(tmp_path / "i.json")
    assert str(Induction.load(tmp_path / "i.json")) == str(found)
    (tmp_path / "i.json").write_text('{"format": 1, "kind": "induction"}')
    with pytest.raises(FormatError, match="not a whole induction"):
        Induction.load(tmp_path / "i.json")
    (tmp_path / "i.json").write_text("[]")
    with pytest.raises(FormatError, match="not an induction of format 1"):
        Induction.load(tmp_path / "i.json")


def test_what_cannot_be_is_refused(planted):
    with pytest.raises(ConfigError, match="no latent to clamp up"):
        made(planted, [])
    with pytest.raises(DataError, match="can read no answer"):
        made(planted, judge=lambda question, text: {})
    with pytest.raises(DataError, match="measured on nothing"):
        made(planted, stats=False)
    for wrong in ({"doses": ()}, {"doses": (-1.0,)}, {"n_induce_random": -1}, {"min_valid": 2.0}):
        with pytest.raises(ConfigError):
            InduceConfig(**wrong)
