"""Many latents in one pass against one latent at a time, by hand."""

import pytest
import torch

from sae_persona.activations.hooks import editing, read
from sae_persona.errors import DataError, ModelError
from sae_persona.features.logit_lens import LogitLens
from sae_persona.features.output_scores import output_scores
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU
from sae_persona.types import HookPoint

HOOK, PROMPT, ALL = HookPoint(1), "so ,", torch.arange(12)


def by_hand(lm, sae, latent, promoted, boost):
    ids = torch.tensor([lm.tokenizer(PROMPT).input_ids])
    mask = torch.ones_like(ids)
    strongest = sae.encode(read(lm, [HOOK], ids, mask)[HOOK][0, -1:]).acts.max()
    plain = lm.model(ids).logits[0, -1].log_softmax(-1)

    def raise_it(x):
        x = x.clone()
        x[0, -1] += boost * strongest * sae.w_dec[latent]
        return x

    with editing(lm, HOOK, raise_it):
        raised = lm.model(ids).logits[0, -1].log_softmax(-1)
    order = raised.argsort(descending=True).tolist()
    rank = min(order.index(token) for token in promoted)
    score = (1 - rank / len(order)) * max(raised[token].exp().item() for token in promoted)
    confidence = [-x.sort(descending=True).values[:10].mean().item() for x in (raised, plain)]
    return score, confidence[0] - confidence[1]


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
@torch.no_grad()
def test_a_batch_gives_what_each_latent_gives_alone(make_tiny_lm, tiny_sae, family):
    lm = make_tiny_lm(family)
    top = LogitLens(lm, tiny_sae).tokens(ALL, 3).promoted
    done = []
    found = output_scores(lm, tiny_sae, HOOK, ALL, top, prompt=PROMPT, boost=2.0, batch=5, on_done=done.append)
    wanted = torch.tensor([by_hand(lm, tiny_sae, i, top[i].tolist(), 2.0) for i in range(12)])
    torch.testing.assert_close(found.score, wanted[:, 0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.delta_confidence, wanted[:, 1], rtol=1e-3, atol=1e-3)
    assert done == [5, 5, 2]
    assert found.score.max() > 1.5 * found.score.min()


@torch.no_grad()
def test_the_last_layer_far_up_makes_the_promoted_token_certain(make_tiny_lm, tiny_sae):
    lm = make_tiny_lm()
    top = LogitLens(lm, tiny_sae).tokens(ALL, 20).promoted
    last = output_scores(lm, tiny_sae, HookPoint(2), ALL, top, prompt=PROMPT, boost=1e4)
    wanted = LogitLens(lm, tiny_sae).logits(ALL)
    size = tiny_sae.w_dec.square().mean(1, keepdim=True).sqrt()
    first = wanted.argmax(1)
    full = tiny_sae.w_dec * lm.model.model.norm.weight @ lm.model.lm_head.weight.T / size
    sure = full.argmax(1) == first  # where no row beyond the tokenizer's wins
    torch.testing.assert_close(last.score[sure], full.softmax(1).amax(1)[sure], rtol=1e-2, atol=1e-3)
    assert sure.any()


def test_what_cannot_be_scored_is_refused(make_tiny_lm, tiny_sae):
    lm, top = make_tiny_lm(), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(DataError, match="a prompt needs a token"):
        output_scores(lm, tiny_sae, HOOK, ALL[:1], top, prompt="")
    w = tiny_sae.w_dec
    with pytest.raises(DataError, match="no latent fires at the last token of the prompt 'so ,': give another"):
        silent = SAE(w, torch.full((12,), -1e6), w, torch.zeros(16), ReLU())
        output_scores(lm, silent, HOOK, ALL[:1], top, prompt=PROMPT)
    with pytest.raises(ModelError, match="transcoder"):
        wide = SAE(w, torch.zeros(12), w, torch.zeros(16), ReLU(), transcodes=True)
        output_scores(lm, wide, HOOK, ALL[:1], top, prompt=PROMPT)
