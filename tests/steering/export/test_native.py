import json
import math

import pytest
import torch
from safetensors.torch import save_file

from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import LM, padded
from sae_persona.errors import ConfigError, FormatError, ModelError
from sae_persona.runs import file_hash
from sae_persona.sae.model import SAE
from sae_persona.steering.apply import intervene
from sae_persona.steering.conditions import When
from sae_persona.steering.export.native import export, load_intervention, write
from sae_persona.steering.interventions import (
    Ablate,
    Add,
    Cap,
    Ceiling,
    Clamp,
    Placed,
    ProjectionClamp,
    ProjectOut,
    Scale,
    Steer,
)
from sae_persona.steering.positions import Spans
from sae_persona.types import HookPoint

HOOK = HookPoint(2)
EDITS = (Clamp(3, 1.5, 4.0), Ablate(8), Scale(11, 2.0), Add(20, 0.5, 3.0))


def logits(lm, prompts):
    return lm.model(**model_inputs(lm, *padded(lm, prompts))).logits


def test_a_file_alone_does_what_it_was_exported_from(lm, sae, prompts, tmp_path):
    path = export(tmp_path / "x.json", lm, sae, EDITS, positions="all", evidence={"why": "a test"})
    with intervene(lm, sae, EDITS, positions="all"):
        wanted = logits(lm, prompts)
    assert (wanted - logits(lm, prompts)).abs().max() > 0.1
    loaded = load_intervention(path)
    with loaded.applied(lm):
        torch.testing.assert_close(logits(lm, prompts), wanted, atol=1e-5, rtol=0)
    assert loaded.parts[sae.hook].needed().n_latents == 4
    assert loaded.latents == (3, 8, 11, 20)
    assert loaded.evidence == {"why": "a test"}
    with load_intervention(path, sae).applied(lm):
        assert torch.equal(logits(lm, prompts), wanted)


def test_the_file_says_what_others_must_know(lm, sae, tmp_path):
    raw = json.loads(export(tmp_path / "x.json", lm, sae, EDITS).read_text())
    assert raw["layer_base"] == 0
    assert raw["error_term"] == "kept"
    assert raw["model"]["config_hash"] == lm.config_hash
    of = raw["saes"]["layers.2.resid_post"]
    assert (of["fingerprint"], of["encoder"], of["latents"]) == (sae.fingerprint, "partial", [3, 8, 11, 20])
    clamp = {"operation": "clamp", "hook": "layers.2.resid_post", "latent": 3, "strength": 1.5, "unit": 4.0}
    assert raw["edits"][0] == {**clamp, "positions": "answer", "priority": 0, "when": None}
    assert "99.9th percentile" in raw["unit"]


def test_topk_asks_for_its_sae(lm, topk_sae, prompts, tmp_path):
    path = export(tmp_path / "x.json", lm, topk_sae, EDITS)
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(ModelError, match="edits a TopK SAE, whose latents depend on each other: pass the SAE too"):
        with load_intervention(path).applied(lm):
            pass
    with intervene(lm, topk_sae, EDITS):
        wanted = logits(lm, prompts)
    with load_intervention(path, topk_sae).applied(lm):
        assert torch.equal(logits(lm, prompts), wanted)


def test_another_model_is_refused(lm, sae, tmp_path):
    path = export(tmp_path / "x.json", lm, sae, EDITS)
    other = LM(lm.model, lm.tokenizer, lm.blocks, lm.blocks_path, "other")
    other.__dict__["config_hash"] = "0" * 64
    with pytest.raises(
        ModelError, match="was made for lab of config .*, and other here has config 00000000: load that model"
    ):
        with load_intervention(path).applied(other):
            pass


def test_another_sae_is_refused(lm, sae, tmp_path):
    path = export(tmp_path / "x.json", lm, sae, EDITS)
    other = SAE(sae.w_enc + 1, sae.b_enc, sae.w_dec, sae.b_dec, sae.rule, sae.metadata)
    with pytest.raises(ModelError, match="was made with another SAE"):
        load_intervention(path, other)


def test_corrupt_files_are_refused(lm, sae, tmp_path):
    path = export(tmp_path / "x.json", lm, sae, EDITS)
    tensors = tmp_path / "x.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-7])
    with pytest.raises(FormatError, match="is not the file that x.json was written with"):
        load_intervention(path)
    tensors.unlink()
    with pytest.raises(FormatError, match="needs x.safetensors beside it, which is missing"):
        load_intervention(path)
    tensors.write_bytes(whole)
    raw = json.loads(path.read_text())

    def edit(**changed):
        return {**raw, "edits": [{**raw["edits"][0], **changed}, *raw["edits"][1:]]}

    for broken, message in (
        ({**raw, "format": 7}, r"not an intervention of format 1 or 2 \(found 7\)"),
        ({**raw, "kind": "recipe"}, "not an intervention"),
        ({k: v for k, v in raw.items() if k != "saes"}, "not a whole intervention"),
        ({**raw, "layer_base": 1}, "counts layers from 1, this version reads 0"),
        ({**raw, "error_term": "dropped"}, "wants the error term 'dropped', this version keeps it"),
        (edit(operation="explode"), "an edit's operation is one of clamp, pin"),
        (edit(strength=math.nan), "needs finite numbers, got nan, 4.0"),
        (edit(strength="much"), "strength must be a number, got 'much'"),
        (edit(latent=999), "edits latent 999, its SAE has latents 0 to 39"),
        (edit(latent=4), "edits latent 4, whose rows it does not have"),
        (edit(latent=8), "latent 8 is edited twice at the same tokens"),
        (edit(hook="layers.3.resid_post"), "tells of no SAE there"),
        (edit(positions="nowhere"), "positions is one of answer, pre"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(FormatError, match=message):
            load_intervention(path)


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


def test_everything_an_intervention_can_be_survives(lm, sae, prompts, tmp_path):
    """Two hook points, latents and directions, conditions that are shared, spans and priorities."""
    g = torch.Generator().manual_seed(1)
    u, v, w = torch.randn(3, lm.d_model, generator=g)
    fires, points = When(latent=5, above=0.2, hook=HOOK), When(direction=w, above=0.1, scope="turn")
    edits = [
        Placed(edit=Clamp(3, 2.0, 6.0), hook=HOOK, positions="all", when=fires, priority=1),
        Placed(edit=Ceiling(3, 0.5, 2.0), hook=HOOK, positions="all"),
        Placed(edit=Steer(u, 2.0), hook=HookPoint(1, "resid_pre"), positions=Spans(((2, 4), (6, 9))), when=points),
        Placed(edit=Cap(v, 0.3, "below"), hook=HookPoint(3), positions="prompt", when=fires),
        Placed(edit=ProjectOut(torch.stack([u, w])), hook=HookPoint(3), positions="answer"),
        Placed(edit=ProjectionClamp(w, 1.5), hook=HookPoint(1), positions="pre", when=points),
    ]
    path = export(tmp_path / "x.json", lm, {HOOK: sae}, edits, evidence={"why": "a test"})
    with intervene(lm, {HOOK: sae}, edits):
        wanted = logits(lm, prompts)
    loaded = load_intervention(path)
    with loaded.applied(lm):
        torch.testing.assert_close(logits(lm, prompts), wanted, atol=1e-5, rtol=0)
    assert loaded.parts[HOOK].latents == (3, 5)
    assert loaded.edits[0].when is loaded.edits[3].when
    again = write(loaded, tmp_path / "again.json")
    facts = [{k: v for k, v in json.loads(p.read_text()).items() if k != "tensors"} for p in (path, again)]
    assert facts[0] == facts[1]
    with load_intervention(again).applied(lm):
        torch.testing.assert_close(logits(lm, prompts), wanted, atol=1e-5, rtol=0)


def test_files_of_format_1_are_read(lm, sae, prompts, tmp_path):
    """As version 0.1 wrote them: one hook point, rows in the order of the edits."""
    edits = (Clamp(11, 1.5, 4.0), Ablate(8))
    rows = {name: w[[11, 8]].contiguous() for name, w in sae.state_dict().items() if name != "b_dec"}
    save_file(rows, tmp_path / "x.safetensors")
    old = {
        "format": 1, "kind": "sae_persona intervention", "hook": str(HOOK), "layer_base": 0, "positions": "all",
        "error_term": "kept", "unit": "99.9th percentile",
        "edits": [{"operation": "clamp", "latent": 11, "strength": 1.5, "unit": 4.0},
                  {"operation": "ablate", "latent": 8}],
        "encoder": "partial",
        "model": {"name": "lab", "config_hash": lm.config_hash, "d_model": lm.d_model, "n_layers": lm.n_layers},
        "sae": {"fingerprint": sae.fingerprint, "n_latents": sae.n_latents, "rule": "Threshold"},
        "tensors": {"file": "x.safetensors", "sha256": file_hash(tmp_path / "x.safetensors")},
        "evidence": {}, "versions": {},
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(old))
    with intervene(lm, sae, edits, positions="all"):
        wanted = logits(lm, prompts)
    with load_intervention(tmp_path / "x.json").applied(lm):
        torch.testing.assert_close(logits(lm, prompts), wanted, atol=1e-5, rtol=0)
