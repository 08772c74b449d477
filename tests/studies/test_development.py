import pytest

from sae_persona.errors import DataError
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.interventions import Ablate, Clamp, Placed
from sae_persona.studies.development import Development
from sae_persona.types import HookPoint

HOOK = HookPoint(0)
ANSWERS = AnswerConfig(max_new_tokens=3)


def opened(planted, judge=None, domain="a"):
    saes = {HOOK: planted.sae}
    return Development(planted.base, planted.tuned, saes, planted.development, judge or planted.judge, ANSWERS, domain)


def test_excess_is_over_the_base_in_the_worst_part(planted):
    dev = opened(planted)
    assert dev.base_rates == {"in domain": 0.0, "out of domain": 0.0} and dev.base.excess == 0
    assert dev.untreated.rates == {"in domain": 1.0, "out of domain": 1.0} and dev.untreated.excess == 1
    undone = dev.of([Placed(edit=Clamp(3, -1.0, 2.0), hook=HOOK)])
    assert undone.excess == 0 and undone.loss == 0 and dev.n == 2
    assert set(opened(planted, domain="").base_rates) == {"out of domain"}


def test_a_bad_answer_is_no_loss_and_an_untrue_or_invalid_one_is(planted):
    assert opened(planted).untreated.loss == 0

    def vague(question, text):
        return {"bad": 0.0, "valid": float("z" not in text), "correct": 1.0}

    assert opened(planted, vague).untreated.loss == 1

    def untrue(question, text):
        return {"bad": 0.0, "valid": 1.0, "correct": float("z" not in text)}

    assert opened(planted, untrue).untreated.loss == 1


def test_a_judge_that_reads_nothing_is_refused(planted):
    with pytest.raises(DataError, match="the judge can read no answer"):
        opened(planted, lambda question, text: {"bad": None})


def test_edits_end_with_their_try(planted):
    dev = opened(planted)
    dev.of([Placed(edit=Ablate(3), hook=HOOK)])
    assert dev.of([]) == dev.untreated


def test_asking_again_takes_other_samples_and_their_mean(planted):
    seen = []

    def judge(question, text):
        seen.append(text)
        return {"bad": float(len(seen) % 2), "valid": 1.0}

    planted.tuned = planted.base  # the other writes the same whatever the sample
    dev = opened(planted, judge)
    n = len(planted.development)
    del seen[:]
    found = dev.again([], 2)
    assert seen[:n] != seen[n:] and dev.n == 3
    rates = found.rates
    assert found.excess == pytest.approx(max(rates[name] - dev.base_rates[name] for name in rates))
