"""The lens against exact linear algebra, in one block and in many."""

import pytest
import torch

from sae_persona.errors import ModelError
from sae_persona.features import logit_lens
from sae_persona.features.logit_lens import LogitLens
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU

ALL = torch.arange(12)


def exact(lm, sae):
    """[n_latents, n_tokens] by hand, for the tiny Llama and GPT-2."""
    norm = lm.model.transformer.ln_f if "GPT2" in lm.name else lm.model.model.norm
    d = sae.w_dec - sae.w_dec.mean(1, keepdim=True) if "GPT2" in lm.name else sae.w_dec
    return (d * norm.weight) @ lm.model.lm_head.weight[: len(lm.tokenizer)].T


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("entries", [1, 2**25], ids=["blocks of one", "one block"])
def test_both_ends_are_those_of_the_exact_logits(make_tiny_lm, tiny_sae, family, entries, monkeypatch):
    monkeypatch.setattr(logit_lens, "ENTRIES", entries)
    lm = make_tiny_lm(family)
    logits = exact(lm, tiny_sae).detach()
    found = LogitLens(lm, tiny_sae).tokens(torch.tensor([7, 0, 3]), 5)
    for row, latent in enumerate((7, 0, 3)):
        order = logits[latent].argsort(descending=True)
        assert found.promoted[row].tolist() == order[:5].tolist()
        assert found.suppressed[row].tolist() == order.flip(0)[:5].tolist()
        torch.testing.assert_close(found.promoted_logits[row], logits[latent][order[:5]], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            found.suppressed_logits[row], logits[latent][order.flip(0)[:5]], rtol=1e-3, atol=1e-3
        )


def test_z_scores_are_over_the_latents(make_tiny_lm, tiny_sae):
    lm = make_tiny_lm()
    logits = LogitLens(lm, tiny_sae).logits(ALL)
    wanted = (logits - logits.mean(0)) / logits.std(0, correction=0)
    torch.testing.assert_close(LogitLens(lm, tiny_sae).logits(ALL, z_scored=True), wanted, rtol=1e-3, atol=1e-3)


def test_a_token_that_every_direction_promotes_leads_no_z_scored_list(make_tiny_lm, tiny_sae):
    lm = make_tiny_lm()
    shared = SAE(tiny_sae.w_enc, tiny_sae.b_enc, torch.nn.functional.normalize(tiny_sae.w_dec + 3, dim=1),
                 tiny_sae.b_dec, ReLU())  # fmt: skip
    lens = LogitLens(lm, shared)
    first = lens.tokens(ALL, 1).promoted.flatten()
    z_scored = lens.tokens(ALL, 1, z_scored=True).promoted.flatten()
    assert len(first.unique()) < len(z_scored.unique())


def test_fewer_tokens_than_asked_for_and_no_latent(make_tiny_lm, tiny_sae):
    lens = LogitLens(make_tiny_lm(), tiny_sae)
    assert lens.tokens(ALL, 10_000).promoted.shape == (12, lens.unembedding.n_tokens)
    assert lens.tokens(ALL[:0], 3).promoted.shape == (0, 3)


def test_rows_beyond_the_tokenizer_are_no_tokens(make_tiny_lm, tiny_sae):
    lm = make_tiny_lm()
    assert LogitLens(lm, tiny_sae).unembedding.n_tokens == len(lm.tokenizer) < lm.model.lm_head.out_features


def test_what_has_no_lens_is_refused(make_tiny_lm, tiny_sae):
    w = torch.randn(12, 7)
    with pytest.raises(ModelError, match="width 7"):
        LogitLens(make_tiny_lm(), SAE(w, torch.zeros(12), w, torch.zeros(7), ReLU()))
    wide = SAE(tiny_sae.w_enc, tiny_sae.b_enc, tiny_sae.w_dec, tiny_sae.b_dec, ReLU(), transcodes=True)
    with pytest.raises(ModelError, match="transcoder"):
        LogitLens(make_tiny_lm(), wide)
    one = tiny_sae.w_dec[:1].expand(12, -1)
    with pytest.raises(ModelError, match="one direction only"):
        LogitLens(make_tiny_lm(), SAE(tiny_sae.w_enc, tiny_sae.b_enc, one * 0, tiny_sae.b_dec, ReLU())).logits(
            ALL, z_scored=True
        )
