"""describe() and silent_texts() on a run of the lab."""

import pytest
import torch

from sae_persona.activations.lm import load_lm
from sae_persona.errors import ConfigError, DataError
from sae_persona.features.describe import DescribeConfig, describe, silent_texts
from sae_persona.features.logit_lens import LogitLens
from sae_persona.features.measure import Measurement
from sae_persona.stages.training import open_sae


def test_puts_together_what_each_part_says(small_run):
    lm, found = load_lm("lab"), Measurement.load(small_run)
    sae = open_sae(small_run, lm)
    config = DescribeConfig(n_tokens=3, lens_top=5, batch=2)
    rows = describe(lm, sae.hook, sae, found.contexts, [5, 0, 9], config)
    assert [row.latent for row in rows] == [5, 0, 9]
    alone = describe(lm, sae.hook, sae, found.contexts, [9], config)[0]
    assert alone.promoted == rows[2].promoted and alone.output_score == pytest.approx(rows[2].output_score, rel=1e-3)
    logits = LogitLens(lm, sae).logits(torch.tensor([9]))[0]
    order = logits.argsort(descending=True)
    assert [token for token, _ in rows[2].promoted] == lm.tokenizer.convert_ids_to_tokens(order[:3].tolist())
    assert rows[2].promoted[0][1] == pytest.approx(float(logits.max()), abs=1e-3)
    top, contexts = set(order[:5].tolist()), found.contexts.of(9)
    hits = [context.tokens[context.acts.index(context.strength)] in top for context in contexts]
    assert rows[2].input_score == sum(hits) / len(hits)
    assert all(0 < row.concentration <= 1 and 0 <= row.output_score <= 1 for row in rows)
    assert describe(lm, sae.hook, sae, found.contexts, [9], DescribeConfig(outputs=False))[0].output_score is None
    z_scored = describe(lm, sae.hook, sae, found.contexts, [9], DescribeConfig(z_scored=True))[0]
    assert z_scored.promoted[0][1] > 1 and len(z_scored.promoted) == 10 and z_scored.input_score is not None


def test_silent_texts_are_of_different_documents_and_the_same_for_a_seed(small_run):
    lm, found = load_lm("lab"), Measurement.load(small_run)
    sae = open_sae(small_run, lm)
    one, same = (silent_texts(lm, sae.hook, sae, found, seed=3) for _ in range(2))
    assert one.contexts == same.contexts and len(one.contexts) > 3
    assert len({context.document for context in one.contexts}) == len(one.contexts)


def test_settings_and_latents_out_of_range(small_run):
    for wrong in ({"n_tokens": 0}, {"lens_top": 0}, {"batch": 0}, {"boost": 0.0}):
        with pytest.raises(ConfigError):
            DescribeConfig(**wrong)
    lm, found = load_lm("lab"), Measurement.load(small_run)
    sae = open_sae(small_run, lm)
    with pytest.raises(DataError, match="latent 24 does not exist: there are latents 0 to 23"):
        describe(lm, sae.hook, sae, found.contexts, [3, 24])
