import json

import pytest
import torch

from sae_persona.errors import ConfigError, FormatError, ModelError
from sae_persona.steering.apply import intervene
from sae_persona.steering.export import control_vector, lm_eval_file, native
from sae_persona.steering.export.importing import import_intervention
from sae_persona.steering.interventions import Clamp, Placed, ProjectionClamp, Steer
from sae_persona.types import HookPoint


def test_control_vectors_are_added_after_their_layers(lm, sums, edited, logits, tmp_path):
    path = control_vector.write(sums, lm, tmp_path / "x.gguf")
    found = import_intervention(path, lm)
    assert found.hooks == [HookPoint(2), HookPoint(3)]
    torch.testing.assert_close(edited(lm, found), edited(lm, sums), atol=1e-5, rtol=0)
    opposite = import_intervention(path, lm, strength=-1.0)
    assert opposite.edits[0].edit.strength == -1.0
    assert not torch.allclose(edited(lm, opposite), edited(lm, found), atol=0.01)


@pytest.mark.parametrize("extra", [0, 1])
def test_persona_vectors_are_rows_by_layer_the_embeddings_first(lm, edited, tmp_path, extra):
    rows = torch.randn(lm.n_layers + extra, lm.d_model, generator=torch.Generator().manual_seed(9))
    torch.save(rows, tmp_path / "evil.pt")
    found = import_intervention(tmp_path / "evil.pt", lm, layer=2, strength=0.5, positions="answer")
    (one,) = found.edits
    assert (one.hook, one.positions, one.edit.strength) == (HookPoint(2), "answer", 0.5)
    assert torch.equal(one.edit.direction, rows[2 + extra])


def test_a_bias_of_lm_eval_moves_where_the_projection_is_set(lm, edited, logits, tmp_path):
    v, bias = torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(10))
    entry = {"action": "clamp", "steering_vector": v, "steering_coefficient": 2.0, "bias": bias}
    torch.save({"layers.2": entry}, tmp_path / "x.pt")
    unit = v / v.norm()

    def harness(_, args, out):
        x = out - bias
        return x - (x @ unit)[..., None] * unit + unit * 2.0 + bias

    handle = lm.blocks[2].register_forward_hook(harness)
    try:
        wanted = logits(lm)
    finally:
        handle.remove()
    torch.testing.assert_close(edited(lm, import_intervention(tmp_path / "x.pt", lm)), wanted, atol=1e-5, rtol=0)


def test_our_own_files_keep_their_places(lm, sae, prompts, tmp_path):
    edits = [Clamp(3, 2.0, 6.0), Placed(edit=ProjectionClamp(torch.ones(lm.d_model), 1.0), hook=HookPoint(4))]
    path = native.export(tmp_path / "x.json", lm, sae, edits, positions="pre")
    found = import_intervention(path, lm)
    assert [(one.hook, one.positions) for one in found.edits] == [(HookPoint(2), "pre"), (HookPoint(4), "answer")]
    for given in ({"layer": 2}, {"strength": 2.0}, {"positions": "all"}):
        with pytest.raises(ConfigError, match="has its own layers, strengths and positions"):
            import_intervention(path, lm, **given)
    with intervene(lm, sae, edits, positions="pre"), found.applied(lm):
        pass  # they nest


def test_files_that_do_not_fit_are_refused_before_the_model_runs(lm, sae, sums, make_lm, tmp_path):
    ran = []
    handle = lm.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    vectors, other = torch.zeros(6, lm.d_model), make_lm("Qwen2")
    for name, content in (
        ("vectors.pt", vectors),
        ("tall.pt", torch.ones(9, lm.d_model)),
        ("nan.pt", torch.full((6, lm.d_model), torch.nan)),
        ("words.pt", {"a": "b"}),
        ("there.pt", {"lm_head": {"action": "add", "steering_vector": torch.ones(128), "steering_coefficient": 1.0,
                                  "bias": None}}),
    ):  # fmt: skip
        torch.save(content, tmp_path / name)
    gguf, ours = tmp_path / "x.gguf", tmp_path / "x.json"
    control_vector.write(sums, lm, gguf)
    native.export(ours, lm, sae, [Clamp(3, 2.0, 6.0)])
    (tmp_path / "y.json").write_text(json.dumps({**json.loads(ours.read_text()), "layer_base": 1}))
    for path, to, given, error, message in (
        ("x.gguf", other, {}, ModelError, r"has vectors \[128\], tiny-Qwen2 has width 32"),
        ("x.gguf", lm, {"layer": 2}, ConfigError, "names its own layers"),
        ("x.gguf", lm, {"strength": float("nan")}, ConfigError, "finite"),
        ("x.json", other, {}, ModelError, "is for width 128, tiny-Qwen2 has 32"),
        ("y.json", lm, {}, FormatError, "counts layers from 1"),
        ("vectors.pt", lm, {"layer": 2}, ConfigError, "a finite vector .* that is not 0"),
        ("vectors.pt", lm, {}, ConfigError, "give --layer, 0 to 4, got None"),
        ("vectors.pt", lm, {"layer": 5}, ConfigError, "give --layer, 0 to 4, got 5"),
        ("tall.pt", lm, {"layer": 2}, ModelError, r"holds \[9, 128\], persona vectors of lab are \[6, 128\]"),
        ("nan.pt", lm, {"layer": 2}, FormatError, "NaN"),
        ("words.pt", lm, {}, FormatError, "is not an lm-eval steered file"),
        ("there.pt", lm, {}, ModelError, "edits lm_head, which is no block of lab"),
        ("x.onnx", lm, {}, FormatError, "ends in no kind that is read"),
        ("gone.json", lm, {}, FormatError, "no intervention file at"),
    ):
        with pytest.raises(error, match=message):
            import_intervention(tmp_path / path, to, **given)
    handle.remove()
    assert not ran


def test_lm_eval_files_are_read_with_their_strength(lm, one_sum, edited, tmp_path):
    path = lm_eval_file.write(one_sum, lm, tmp_path / "x.pt")
    whole = import_intervention(path, lm).edits[0].edit
    half = import_intervention(path, lm, strength=0.5).edits[0].edit
    assert isinstance(whole, Steer) and half.strength == whole.strength / 2
