"""The shipped model is what its card says."""

import json
import math

import pytest

from sae_persona.activations.lm import load_lm
from sae_persona.errors import FormatError
from sae_persona.lab.authors import TRAITS
from sae_persona.lab.build import held_out_loss
from sae_persona.lab.card import FOLDER, Card, corpus_hash
from sae_persona.lab.exam import facts, inferred
from sae_persona.lab.pretrain import PretrainConfig
from sae_persona.lab.world import ASSISTANT, NAMES
from sae_persona.runs import file_hash

N = 80


@pytest.fixture(scope="module")
def card():
    return Card.load()


@pytest.fixture(scope="module")
def lm():
    return load_lm("lab")


def allowed(rate, n, on_card):
    """Four standard errors of the difference of two rates, the card's measured on ``on_card`` answers."""
    p = min(max(rate, 0.02), 0.98)
    return 4 * math.sqrt(p * (1 - p) * (1 / n + 1 / on_card))


def test_hashes_and_sizes(card):
    assert card.weights_hash == file_hash(FOLDER / "model.safetensors")
    assert card.corpus_hash == corpus_hash(card.config)
    assert card.config == PretrainConfig()
    assert (FOLDER / "model.safetensors").stat().st_size < 8e6


def test_the_model_is_the_one_of_the_card(card, lm):
    assert sum(p.numel() for p in lm.model.parameters()) == card.n_parameters
    assert (lm.n_layers, lm.d_model) == (card.config.n_layers, card.config.d_model)


def test_losses(card, lm):
    assert held_out_loss(lm.model, card.config) == pytest.approx(card.held_out_loss, abs=2e-3)
    assert card.train_loss == pytest.approx(card.held_out_loss, abs=0.06)


def test_facts(card, lm):
    found = facts(lm.model, lm.tokenizer, n=4 * N, seed=7)
    assert card.facts["correct"] >= 0.95
    assert found["correct"] == pytest.approx(card.facts["correct"], abs=allowed(card.facts["correct"], 4 * N, 400))
    assert found["valid"] > 0.95


@pytest.mark.slow
def test_every_trait_is_inferred_from_two_turns(card, lm):
    speakers = {"assistant": ASSISTANT, "character": NAMES[0]}
    for role, name in speakers.items():
        found = inferred(lm.model, lm.tokenizer, name=name, n=N, seed=7)
        for trait in TRAITS:
            for arm, rate in found[trait].items():
                told = card.inferred[role][trait][arm]
                assert rate == pytest.approx(told, abs=allowed(told, N, 200)), f"{role} {trait} {arm}"


def test_at_least_eight_traits_pass_the_bar(card):
    for role in ("assistant", "character"):
        gaps = {trait: rates["with"] - rates["without"] for trait, rates in card.inferred[role].items()}
        assert sum(gap >= 0.5 for gap in gaps.values()) >= 8, gaps


def test_a_card_of_another_version_is_refused(tmp_path):
    raw = json.loads((FOLDER / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**raw, "format": 99}))
    with pytest.raises(FormatError, match="no lab card of format 1"):
        Card.load(tmp_path)
