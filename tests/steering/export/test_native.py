import json

import pytest
import torch

from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import LM, padded
from sae_persona.errors import ConfigError, FormatError, ModelError
from sae_persona.sae.model import SAE
from sae_persona.steering.apply import intervene
from sae_persona.steering.export.native import export, load_intervention
from sae_persona.steering.interventions import Ablate, Add, Clamp, Scale

EDITS = (Clamp(3, 1.5, 4.0), Ablate(8), Scale(11, 2.0), Add(20, 0.5, 3.0))


def logits(lm, prompts):
    return lm.model(**model_inputs(lm, *padded(lm, prompts))).logits


def test_a_file_alone_does_what_it_was_exported_from(lm, sae, prompts, tmp_path):
    path = export(tmp_path / "x.json", lm, sae, EDITS, positions="all", evidence={"why": "a test"})
    with intervene(lm, sae, EDITS, positions="all"):
        wanted = logits(lm, prompts)
    assert (wanted - logits(lm, prompts)).abs().max() > 0.1
    loaded = load_intervention(path, lm)
    with loaded.applied():
        torch.testing.assert_close(logits(lm, prompts), wanted, atol=1e-5, rtol=0)
    assert loaded.sae.n_latents == 4
    assert loaded.latents == (3, 8, 11, 20)
    assert loaded.evidence == {"why": "a test"}
    with load_intervention(path, lm, sae).applied():
        assert torch.equal(logits(lm, prompts), wanted)


def test_the_file_says_what_others_must_know(lm, sae, tmp_path):
    raw = json.loads(export(tmp_path / "x.json", lm, sae, EDITS).read_text())
    assert raw["hook"] == "layers.2.resid_post"
    assert raw["layer_base"] == 0
    assert raw["error_term"] == "kept"
    assert raw["encoder"] == "partial"
    assert raw["model"]["config_hash"] == lm.config_hash
    assert raw["sae"]["fingerprint"] == sae.fingerprint
    assert raw["edits"][0] == {"operation": "clamp", "latent": 3, "strength": 1.5, "unit": 4.0}
    assert "99.9th percentile" in raw["unit"]


def test_topk_asks_for_its_sae(lm, topk_sae, prompts, tmp_path):
    path = export(tmp_path / "x.json", lm, topk_sae, EDITS)
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(ModelError, match="edits a TopK SAE, whose latents depend on each other: pass the SAE too"):
        load_intervention(path, lm)
    with intervene(lm, topk_sae, EDITS):
        wanted = logits(lm, prompts)
    with load_intervention(path, lm, topk_sae).applied():
        assert torch.equal(logits(lm, prompts), wanted)


def test_another_model_is_refused(lm, sae, tmp_path):
    path = export(tmp_path / "x.json", lm, sae, EDITS)
    other = LM(lm.model, lm.tokenizer, lm.blocks, lm.blocks_path, "other")
    other.__dict__["config_hash"] = "0" * 64
    with pytest.raises(ModelError, match="was made for lab, other has another config"):
        load_intervention(path, other)


def test_another_sae_is_refused(lm, sae, tmp_path):
    path = export(tmp_path / "x.json", lm, sae, EDITS)
    other = SAE(sae.w_enc + 1, sae.b_enc, sae.w_dec, sae.b_dec, sae.rule, sae.metadata)
    with pytest.raises(ModelError, match="was made with another SAE"):
        load_intervention(path, lm, other)


def test_corrupt_files_are_refused(lm, sae, tmp_path):
    path = export(tmp_path / "x.json", lm, sae, EDITS)
    tensors = tmp_path / "x.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-7])
    with pytest.raises(FormatError, match="is not the file that x.json was written with"):
        load_intervention(path, lm)
    tensors.unlink()
    with pytest.raises(FormatError, match="needs x.safetensors beside it, which is missing"):
        load_intervention(path, lm)
    tensors.write_bytes(whole)
    raw = json.loads(path.read_text())
    for broken, message in (
        ({**raw, "format": 7}, r"not an intervention of format 1 \(found 7\)"),
        ({**raw, "kind": "recipe"}, "not an intervention"),
        ({k: v for k, v in raw.items() if k != "hook"}, "not a whole intervention"),
        ({**raw, "edits": [{"operation": "explode", "latent": 3}]}, "an edit's operation is one of clamp, pin"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(FormatError, match=message):
            load_intervention(path, lm)


def test_what_cannot_be_exported_writes_nothing(lm, sae, tmp_path):
    narrow = SAE(sae.w_enc[:, :5], sae.b_enc, sae.w_dec[:, :5], sae.b_dec[:5], sae.rule, sae.metadata)
    for arguments, error in (
        ((tmp_path / "x.txt", lm, sae, EDITS), ConfigError),
        ((tmp_path / "x.json", lm, sae, ()), ConfigError),
        ((tmp_path / "x.json", lm, narrow, EDITS), ModelError),
    ):
        with pytest.raises(error):
            export(*arguments)
    assert not list(tmp_path.iterdir())
