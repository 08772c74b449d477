import json

import pytest
import torch
import transformers

from sae_persona.errors import ConfigError
from sae_persona.steering.export import baked
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Cap, Placed, ProjectOut, Steer
from sae_persona.types import HookPoint

FIRST = HookPoint(0, "resid_pre")


def reloaded(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def ablation(lm, hooks):
    q = torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(3))
    return Intervention.of(lm, None, [Placed(edit=ProjectOut(q), hook=h, positions="every") for h in hooks])


def test_a_llama_with_biases_does_what_the_edits_do(lm, sums, edited, logits, tmp_path):
    path = baked.write(sums, lm, tmp_path / "model")
    assert json.loads((path / "config.json").read_text())["mlp_bias"] is True
    torch.testing.assert_close(logits(lm, reloaded(path)), edited(lm, sums), atol=1e-5, rtol=0)
    assert lm.model.config.mlp_bias is False  # the model itself stays as it was
    assert transformers.AutoTokenizer.from_pretrained(path).bos_token_id == lm.bos_id


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX"])
def test_a_family_that_has_biases(make_lm, edited, logits, tmp_path, family):
    lm = make_lm(family)
    made = steer(lm)
    path = baked.write(made, lm, tmp_path / "model")
    torch.testing.assert_close(logits(lm, reloaded(path)), edited(lm, made), atol=1e-5, rtol=0)


def test_any_edit_of_what_enters_the_first_block(lm, edited, logits, tmp_path):
    g = torch.Generator().manual_seed(4)
    u, v, w = torch.randn(3, lm.d_model, generator=g)
    edits = [ProjectOut(u), Cap(v, 0.01, "below"), Steer(w, 0.05)]
    made = Intervention.of(lm, None, [Placed(edit=e, hook=FIRST, positions="every") for e in edits])
    path = baked.write(made, lm, tmp_path / "model")
    torch.testing.assert_close(logits(lm, reloaded(path)), edited(lm, made), atol=1e-5, rtol=0)


def test_directions_leave_the_weights_where_that_is_exact(make_lm, edited, logits, tmp_path):
    lm = make_lm("GPTNeoX")  # attention and MLP read the same stream
    made = ablation(lm, [FIRST, HookPoint(0), HookPoint(1), HookPoint(2)])
    path = baked.write(made, lm, tmp_path / "model")
    torch.testing.assert_close(logits(lm, reloaded(path)), edited(lm, made), atol=1e-5, rtol=0)


def test_what_weights_cannot_do_is_refused(lm, make_lm, tmp_path):
    everywhere = [FIRST, *(HookPoint(i) for i in range(lm.n_layers))]
    gemma, qwen = make_lm("Gemma2"), make_lm("Qwen2")
    for model, made, message in (
        (lm, ablation(lm, everywhere), "reads it in between"),
        (lm, ablation(lm, everywhere[:-1]), "behind every block, or at layers.0.resid_pre alone"),
        (gemma, steer(gemma), "the model changes what its blocks write before it adds it"),
        (qwen, steer(qwen), r"have no bias, and its config \(qwen2\) knows none: choose --format peft"),
    ):
        with pytest.raises(ConfigError, match=message):
            baked.write(made, model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def steer(lm):
    direction = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(5))
    return Intervention.of(lm, None, [Steer(direction, 1.0)], hook=HookPoint(1), positions="every")
