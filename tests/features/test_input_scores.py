import pytest

from sae_persona.features.contexts import Context
from sae_persona.features.input_scores import input_score, token_concentration

CONTEXTS = [
    Context(0, 1, [5, 6, 7], [0.0, 4.0, 1.0]),
    Context(1, 0, [6, 5], [2.0, 0.0]),
    Context(2, 2, [5, 5, 9], [0.0, 0.0, 3.0]),
]


def test_concentration_is_the_share_of_the_token_with_most_mass():
    assert token_concentration(CONTEXTS) == pytest.approx(6 / 10)
    assert token_concentration(CONTEXTS[1:2]) == 1.0
    assert token_concentration([]) is None


def test_input_score_is_the_share_of_peaks_among_the_promoted():
    assert input_score(CONTEXTS, {6}) == pytest.approx(2 / 3)
    assert input_score(CONTEXTS, {6, 9}) == 1.0
    assert input_score(CONTEXTS, {5, 7}) == 0.0
    assert input_score([], {6}) is None
