import pytest
import torch

from sae_persona.activations.hooks import Call, editing, model_inputs, watching
from sae_persona.activations.lm import padded
from sae_persona.attribution.ablation import exact_effects
from sae_persona.attribution.metrics import sides_of
from sae_persona.attribution.patching import attribute
from sae_persona.errors import ConfigError
from sae_persona.sae.sparsity import TopK
from sae_persona.types import HookPoint

HOOK = HookPoint(2)


def metric(lm, sides, edit) -> float:
    """One pair, one side at a time, with decode(f with f_i = c) + error in place of the delta form."""
    total = 0.0
    for side in sides:
        ids, mask = padded(lm, [side.ids])
        with torch.no_grad(), editing(lm, HOOK, lambda x, side=side: edit(x, side)):
            found = lm.model(**model_inputs(lm, ids, mask)).logits[0].log_softmax(-1)
        total += side.sign * sum(float(found[t - 1, side.ids[t]]) for t in range(side.start, len(side.ids)))
    return total


@pytest.mark.parametrize("positions", ["pre", "answer", "all"])
@pytest.mark.parametrize("target", [0.0, 3.0])
def test_effects_are_those_of_one_latent_set_by_hand(lm, sae, pairs, positions, target):
    latents = torch.tensor([4, 0, 17])
    sides = sides_of(lm, pairs[:2], positions)
    found = exact_effects(lm, sae, HOOK, sides, latents, targets=torch.full((3,), target) if target else None, batch=5)

    def edit(x, side, latent):
        y = x.clone()
        here = x[0, side.edited]
        f = sae.encode(here).dense(sae.n_latents)
        changed = f.clone()
        changed[:, latent] = target
        y[0, side.edited] = changed @ sae.w_dec + (here - f @ sae.w_dec)
        return y

    for pair in range(2):
        own = [side for side in sides if side.pair == pair]
        base = metric(lm, own, lambda x, _: x)
        assert float(found.base[pair]) == pytest.approx(base, abs=1e-3)
        for column, latent in enumerate(latents.tolist()):
            change = metric(lm, own, lambda x, side, latent=latent: edit(x, side, latent)) - base
            assert float(found.change[pair, column]) == pytest.approx(change, abs=1e-3)
    assert found.change.abs().max() > 0.01


def test_what_does_not_fire_is_not_run_and_has_no_effect(lm, sae, pairs):
    silent = type(sae)(sae.w_enc, sae.b_enc - 1e6, sae.w_dec, sae.b_dec, sae.rule)
    calls: list[Call] = []
    with watching(lm, calls.append):
        found = exact_effects(lm, silent, HOOK, sides_of(lm, pairs[:4], "all"), torch.arange(9), batch=8)
    assert not found.change.any() and not found.touched.any()
    assert len(calls) == 1


def test_a_latent_that_does_not_exist(lm, sae, pairs):
    with pytest.raises(ConfigError, match="latent 60 does not exist: this SAE has latents 0 to 59"):
        exact_effects(lm, sae, HOOK, sides_of(lm, pairs[:1], "pre"), torch.tensor([1, 60]))


def test_before_a_block_is_after_the_one_before(lm, sae, pairs):
    """Both sites of one place give the same effects and estimates."""
    sides, latents = sides_of(lm, pairs[:2], "answer"), torch.arange(5)
    post, pre = (exact_effects(lm, sae, hook, sides, latents) for hook in (HOOK, HookPoint(3, "resid_pre")))
    torch.testing.assert_close(post.change, pre.change, atol=1e-4, rtol=1e-3)
    post, pre = (attribute(lm, sae, hook, sides) for hook in (HOOK, HookPoint(3, "resid_pre")))
    torch.testing.assert_close(post.effect, pre.effect, atol=1e-4, rtol=1e-3)


def test_a_latent_that_top_k_does_not_keep_is_0(lm, sae, pairs):
    """Under TopK what is ablated is what survived among all latents, not what its own row of the encoder says."""
    topk = type(sae)(sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec, TopK(3), sae.metadata)
    sides = sides_of(lm, pairs[:4], "pre")
    found = exact_effects(lm, topk, HOOK, sides, torch.arange(topk.n_latents))
    assert int(found.touched.sum(1).max()) <= 6  # three at the token of each side
    rate = attribute(lm, topk, HOOK, sides).rate
    assert float(rate.sum()) == pytest.approx(3)
    assert set(found.touched.any(0).nonzero().flatten().tolist()) == set(rate.nonzero().flatten().tolist())
