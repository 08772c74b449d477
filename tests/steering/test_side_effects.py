import numpy as np
import pytest
import torch

from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import padded
from sae_persona.errors import ConfigError, DataError
from sae_persona.lab import corpora
from sae_persona.steering.apply import intervene
from sae_persona.steering.interventions import Add, Clamp
from sae_persona.steering.side_effects import HeldOut, HeldOutConfig

CONFIG = HeldOutConfig(context_size=40, n_sequences=9, batch=4)


@pytest.fixture(scope="module")
def rows():
    return [row["messages"] for row in corpora.corpus(6)]


@pytest.fixture(scope="module")
def held_out(lm, rows):
    return HeldOut(lm, [{"messages": messages} for messages in rows], CONFIG)


def test_the_cost_is_cross_entropy_with_minus_without(lm, sae, held_out):
    edits = [Clamp(1, 1.0, 6.0)]
    nats = {"base": 0.0, "steered": 0.0}
    for ids in held_out._ids:
        inputs = model_inputs(lm, *padded(lm, [ids]))
        targets = torch.tensor(ids[1:])
        with torch.no_grad():
            nats["base"] -= float(lm.model(**inputs).logits[0, :-1].log_softmax(-1)[range(len(targets)), targets].sum())
            with intervene(lm, sae, edits, positions="all"):
                logits = lm.model(**inputs).logits[0, :-1]
            nats["steered"] -= float(logits.log_softmax(-1)[range(len(targets)), targets].sum())
    assert len(held_out._ids) == 9 and max(map(len, held_out._ids)) <= 40
    cost = held_out.cost(sae, edits)
    assert held_out.ce == pytest.approx(nats["base"] / held_out.n_tokens, rel=1e-5)
    assert cost.value == pytest.approx((nats["steered"] - nats["base"]) / held_out.n_tokens, rel=1e-4)
    assert 0 < cost.low < cost.value < cost.high


def test_no_edit_costs_nothing(sae, held_out):
    assert held_out.cost(sae, [Add(1, 0.0, 1.0)]) == (0, 0, 0)


def test_pieces_of_one_text_are_drawn_together(held_out):
    assert len(np.unique(held_out._text_of)) < len(held_out._text_of)


def test_texts_that_cannot_be_read_are_refused(lm):
    with pytest.raises(DataError, match="no held-out text has two tokens"):
        HeldOut(lm, ["a"] if not lm.prefix else [""], CONFIG)
    with pytest.raises(ConfigError, match="context_size is at least 2"):
        HeldOutConfig(context_size=1)
