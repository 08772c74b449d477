import pytest
import torch

from sae_persona.errors import ModelError
from sae_persona.sae import model
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Threshold, TopK

RULES = {"topk": TopK(5), "relu": ReLU(), "threshold": Threshold(torch.linspace(-0.5, 1, 40))}


def make(rule, seed=0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    w_enc, w_dec, b_enc, b_dec = (torch.randn(*s, generator=generator) for s in ((40, 8), (40, 8), (40,), (8,)))
    return SAE(w_enc, b_enc, torch.nn.functional.normalize(w_dec, dim=1), b_dec, rule)


def tokens(*shape) -> torch.Tensor:
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=RULES.values(), ids=RULES.keys())
def sae(request) -> SAE:
    return make(request.param)


def dense_encode(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    return sae.rule.select(x @ sae.w_enc.T + sae.b_enc).dense(40)


def test_encode_and_decode_are_the_dense_formula(sae, monkeypatch):
    monkeypatch.setattr(model, "DENSE_ENTRIES", 3 * 40)  # so that 7 tokens take three parts
    x = tokens(7)
    latents = sae.encode(x)
    torch.testing.assert_close(latents.dense(40), dense_encode(sae, x))
    torch.testing.assert_close(sae.decode(latents), dense_encode(sae, x) @ sae.w_dec + sae.b_dec)


def test_latents_at_are_the_chosen_columns(sae):
    x, idx = tokens(20, 3), torch.tensor([39, 0, 0])
    wanted = dense_encode(sae, x.view(60, 8)).view(20, 3, 40)[..., idx]
    torch.testing.assert_close(sae.latents_at(x, idx), wanted)
    assert wanted.any(dim=0).any(dim=0).all()


def test_gradients_reach_the_input_through_chosen_latents(sae):
    x = tokens(6).requires_grad_()
    sae.latents_at(x, torch.arange(40)).sum().backward()
    fires = (dense_encode(sae, x.detach()) > 0).float()
    torch.testing.assert_close(x.grad, fires @ sae.w_enc)


def test_raising_an_activation_moves_the_reconstruction_along_its_direction(sae):
    latents = sae.encode(tokens(1))
    before = sae.decode(latents)
    latents.acts.view(-1)[0] += 1
    torch.testing.assert_close(sae.decode(latents) - before, sae.directions(latents.idx.view(-1)[:1]))


def test_another_width_is_refused(sae):
    with pytest.raises(ModelError, match="reads width 8, the activations have 9"):
        sae.encode(torch.zeros(2, 9))
    with pytest.raises(ModelError):
        sae.latents_at(torch.zeros(2, 9), torch.tensor([0]))


def test_fingerprint_tells_weights_and_rules_apart():
    prints = {make(rule).fingerprint for rule in (*RULES.values(), TopK(6), Threshold(torch.zeros(40)))}
    assert len(prints) == 5 and make(ReLU()).fingerprint in prints
    assert make(ReLU(), seed=1).fingerprint not in prints


def test_the_threshold_moves_with_the_weights():
    assert make(RULES["threshold"]).to("meta").rule.threshold.is_meta
