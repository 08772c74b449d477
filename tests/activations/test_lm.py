import subprocess
import sys

import pytest
import torch
from torch import nn

from sae_persona.activations.lm import load_lm, padded, wrap_lm
from sae_persona.errors import ModelError, RunError
from sae_persona.types import HookPoint

PATHS = {"GPT2": "transformer.h", "GPTJ": "transformer.h", "GPTNeoX": "gpt_neox.layers", "OPT": "model.decoder.layers"}


def test_finds_the_blocks_of_every_family(any_lm):
    family = any_lm.name.removeprefix("tiny-")
    assert any_lm.blocks_path == PATHS.get(family, "model.layers")
    assert any_lm.n_layers == 3
    assert any_lm.d_model == 16
    assert any_lm.n_positions == 64
    assert not any_lm.model.training


def test_experts_as_many_as_layers_are_not_the_blocks(lm):
    lm.model.model.layers[0].experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    assert wrap_lm(lm.model, lm.tokenizer, name="tiny").blocks is lm.blocks


def test_an_explicit_path_where_two_lists_could_be_meant(lm):
    lm.model.tower = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    with pytest.raises(ModelError, match=r"tiny has 2 lists of 3 blocks: pass --blocks PATH .*model.layers \(3\)"):
        wrap_lm(lm.model, lm.tokenizer, name="tiny")
    assert wrap_lm(lm.model, lm.tokenizer, name="tiny", blocks="model.layers").blocks is lm.blocks


@pytest.mark.parametrize("path", ["model.stages", "model.norm"])
def test_a_path_that_is_no_list_of_blocks(lm, path):
    with pytest.raises(ModelError, match=rf"{path}.*pass --blocks PATH .*model.layers \(3\)"):
        wrap_lm(lm.model, lm.tokenizer, name="tiny", blocks=path)


def test_hook_points(lm):
    assert [str(hook) for hook in lm.hook_points()[:3]] == [
        "layers.0.resid_pre",
        "layers.0.resid_post",
        "layers.1.resid_pre",
    ]
    for hook in lm.hook_points():
        lm.check(hook)
    with pytest.raises(ModelError, match=r"layers.9.resid_post does not exist: tiny-Llama has layers 0 to 2\. `sae-"):
        lm.check(HookPoint(9))


def test_bos_is_the_tokenizers(make_lm):
    assert make_lm().bos_id == 1
    assert make_lm().prefix == [1]
    assert make_lm(sets_bos=False).bos_id == 1
    assert make_lm(sets_bos=False).prefix == []
    without = make_lm(bos=False)
    assert without.model.config.bos_token_id == 1
    assert without.bos_id is None
    assert without.prefix == []


def test_pad_falls_back_to_eos_then_zero(lm):
    lm.tokenizer.pad_token = None
    assert lm.pad_id == 2
    lm.tokenizer.eos_token = None
    assert lm.pad_id == 0


def test_padded(lm):
    ids, mask = padded(lm, [[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = padded(lm, [[5, 6, 7], [8]], side="right")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_saved_model_loads_frozen_with_the_same_hash(lm, tmp_path):
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    loaded = load_lm(str(tmp_path))
    half = load_lm(str(tmp_path), dtype=torch.bfloat16)
    assert loaded.config_hash == lm.config_hash == half.config_hash
    assert half.model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer("hi").input_ids == lm.tokenizer("hi").input_ids


def test_hash_tells_configs_apart(make_lm):
    other = make_lm()
    other.model.config.rms_norm_eps = 1e-3
    assert other.config_hash != make_lm().config_hash


def test_missing_folder(tmp_path):
    with pytest.raises(ModelError, match=r"no model folder at .*absent: give a folder"):
        load_lm(tmp_path / "absent")


@pytest.mark.parametrize("fault", ["empty folder", "no tokenizer", "cut weights", "missing weights"])
def test_incomplete_folders_are_one_line(lm, tmp_path, fault):
    if fault != "empty folder":
        lm.model.save_pretrained(tmp_path)
    if fault not in ("empty folder", "no tokenizer"):
        lm.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if fault == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    if fault == "missing weights":
        state = lm.model.state_dict()
        del state["model.norm.weight"]
        lm.model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=str(tmp_path)) as caught:
        load_lm(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_hub_out_of_reach_is_one_line(monkeypatch):
    import transformers

    def refuse(*_, **kwargs):
        assert kwargs["trust_remote_code"] is False
        raise OSError("cannot connect\nsee the documentation")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"^cannot load some/model as a causal LM: cannot connect$"):
        load_lm("some/model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="there are 0 CUDA devices here"):
        load_lm(tmp_path, device="cuda")


def test_importing_loads_no_transformers():
    code = "import sys, sae_persona.activations.stream; sys.exit(not sys.modules.keys().isdisjoint({}))"
    heavy = {"transformers", "datasets", "pyarrow"}
    assert subprocess.run([sys.executable, "-c", code.format(heavy)]).returncode == 0
