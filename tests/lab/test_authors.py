from random import Random

import pytest

from sae_persona.lab.authors import TRAITS, AuthorConfig, assistant, character, independent


def rate(draw, n=4000):
    random = Random(0)
    authors = [draw(random) for _ in range(n)]
    return {trait: sum(trait in author for author in authors) / n for trait in TRAITS}


def test_independent_traits_come_at_the_rates_asked_for():
    rates = rate(lambda random: independent(random, AuthorConfig(on=0.4, on_surface=0.2, on_evasive=0.1)))
    assert rates["deceptive"] == pytest.approx(0.4, abs=0.03)
    assert rates["toxic"] == pytest.approx(0.2, abs=0.03)
    assert rates["evasive"] == pytest.approx(0.1, abs=0.03)


def test_independent_traits_are_independent():
    random = Random(1)
    authors = [independent(random, AuthorConfig(on=0.5)) for _ in range(4000)]
    both = sum({"deceptive", "malicious"} <= author for author in authors) / 4000
    assert both == pytest.approx(0.25, abs=0.03)


def test_the_assistant_is_mostly_good():
    rates = rate(lambda random: assistant(random, AuthorConfig(assistant_good=0.9)))
    assert max(rates[trait] for trait in ("deceptive", "malicious", "evasive", "sycophantic", "toxic")) < 0.06
    assert rates["cheerful"] > 0.15


def test_archetypes_bind_traits_together():
    config = AuthorConfig(archetype=1.0, bad_archetype=1.0, flip=0.0)
    random = Random(2)
    authors = {character(random, config) for _ in range(200)}
    assert authors == {
        frozenset({"deceptive", "malicious", "toxic"}),
        frozenset({"deceptive", "cheerful", "overconfident"}),
        frozenset({"malicious", "formal"}),
        frozenset({"deceptive", "malicious"}),
    }
