import pytest

from sae_persona.activations.lm import load_lm


@pytest.fixture(scope="session")
def lab_lm():
    return load_lm("lab")
