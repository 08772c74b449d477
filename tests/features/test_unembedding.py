"""The folded map against finite differences of the true logits, on random models of several families."""

import pytest
import torch
import transformers
from torch import nn

from sae_persona.activations.hooks import editing, model_inputs, read
from sae_persona.activations.lm import wrap_lm
from sae_persona.errors import ModelError
from sae_persona.features.unembedding import find_unembedding
from sae_persona.types import HookPoint

CENTRED = {"GPT2", "GPTNeoX", "OPT", "Phi", "GPTJ"}


def logits_at(lm, stream):
    """The model's own logits where the last block gives ``stream`` [n, d_model]."""
    ids = torch.full((len(stream), 2), 5)
    with editing(lm, HookPoint(lm.n_layers - 1), lambda _: stream[:, None].expand(-1, 2, -1)), torch.no_grad():
        return lm.model(**model_inputs(lm, ids, torch.ones_like(ids))).logits[:, -1]


def derivative(lm, x, directions, step):
    """Of the logits at x along each direction, by central differences; a soft cap is undone."""
    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    both = [logits_at(lm, x + sign * step * directions) for sign in (1, -1)]
    up, down = (cap * torch.atanh(each / cap) if cap else each for each in both)
    return (up - down) / (2 * step)


def test_the_map_is_the_derivative_of_the_true_logits(lensed_lm):
    """Along directions on which the norm's divisor does not change: those at right angles to the (centred) stream."""
    lm = lensed_lm
    found = find_unembedding(lm)
    assert found.centred == (lm.name.removeprefix("tiny-") in CENTRED)
    torch.manual_seed(3)
    x = 3 * torch.randn(16)
    inner = x - x.mean() if found.centred else x
    directions = torch.randn(6, 16)
    directions -= (directions @ inner / (inner @ inner))[:, None] * inner
    divisor = inner.square().mean().sqrt()
    got = found.logits(directions) / divisor
    wanted = derivative(lm, x, directions, 0.03)[:, : found.n_tokens]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_the_map_gives_the_logits_of_a_large_direction_but_for_the_biases(lensed_lm):
    """Far out the norm divides by the direction's own size: logits(t d) - logits(-t d) is twice the map."""
    lm = lensed_lm
    found = find_unembedding(lm)
    torch.manual_seed(4)
    directions = torch.randn(5, 16)
    inner = directions - directions.mean(1, keepdim=True) if found.centred else directions
    size = inner.square().mean(1, keepdim=True).sqrt()
    wanted = derivative(lm, torch.zeros(16), 1e3 * directions, 1.0) * 1e3
    got = found.logits(directions) / size * 1e3
    torch.testing.assert_close(got, wanted[:, : found.n_tokens], rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_a_projection_before_the_unembedding_is_part_of_the_map(make_tiny_lm, small_sizes):
    torch.manual_seed(0)
    config = transformers.OPTConfig(**small_sizes, ffn_dim=32, word_embed_proj_dim=8, do_layer_norm_before=False)
    lm = wrap_lm(transformers.OPTForCausalLM(config), make_tiny_lm("OPT").tokenizer, name="narrow")
    found = find_unembedding(lm)
    assert found.project is not None and found.project.shape == (8, 16)
    direction = torch.randn(1, 16)
    wanted = derivative(lm, torch.zeros(16), direction, 1.0)
    torch.testing.assert_close(found.logits(direction), wanted[:, : found.n_tokens], rtol=1e-4, atol=1e-4)


def test_a_models_own_scale_of_its_logits_is_kept(make_tiny_lm, small_sizes):
    torch.manual_seed(0)
    model = transformers.CohereForCausalLM(transformers.CohereConfig(**small_sizes, logit_scale=0.25))
    lm = wrap_lm(model, make_tiny_lm().tokenizer, name="scaled")
    assert find_unembedding(lm).scale == pytest.approx(0.25, rel=1e-3)


def test_half_precision_finds_the_same_map(make_tiny_lm):
    lm = make_tiny_lm("Gemma2")
    exact = find_unembedding(lm)
    lm.model.bfloat16()
    half = find_unembedding(lm)
    torch.testing.assert_close(half.gain, exact.gain, rtol=0.02, atol=0.02)
    assert half.centred == exact.centred and half.scale == pytest.approx(1, rel=0.02)


def test_what_no_map_describes_is_refused(make_tiny_lm):
    class Squash(nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    class Cubed(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 3

    lm = make_tiny_lm()
    norm, head = lm.model.model.norm, lm.model.lm_head
    lm.model.model.norm = Squash()
    with pytest.raises(ModelError, match="Squash of tiny-Llama is neither an RMSNorm nor a LayerNorm"):
        find_unembedding(lm)
    lm.model.model.norm, lm.model.lm_head = norm, nn.Sequential(head)
    with pytest.raises(ModelError, match="no linear unembedding"):
        find_unembedding(lm)
    lm.model.lm_head = Cubed(16, 300, bias=False)
    with pytest.raises(ModelError, match="do not follow from its final norm"):
        find_unembedding(lm)


def test_nothing_stays_hooked(make_tiny_lm):
    lm = make_tiny_lm()
    find_unembedding(lm)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
    assert read(lm, [HookPoint(0)], torch.tensor([[5]]), torch.tensor([[1]]))[HookPoint(0)].shape == (1, 1, 16)
