import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from sae_persona.errors import ConfigError
from sae_persona.steering.export import peft_adapter
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Steer
from sae_persona.types import HookPoint


@pytest.mark.parametrize("kind", ["beft", "lora"])
def test_peft_reads_it_and_it_does_what_the_edits_do(lm, sums, edited, logits, tmp_path, kind):
    peft = pytest.importorskip("peft")
    path = peft_adapter.write(sums, lm, tmp_path / "adapter", kind=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a bias cannot be merged where there is none
        model = peft.PeftModel.from_pretrained(copy.deepcopy(lm.model), path)
    torch.testing.assert_close(logits(lm, model), edited(lm, sums), atol=1e-5, rtol=0)


def test_the_folder_says_which_modules_and_where_it_comes_from(lm, sums, tmp_path):
    path = peft_adapter.write(sums, lm, tmp_path / "adapter")
    config = json.loads((path / "adapter_config.json").read_text())
    modules = ["model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    assert (config["peft_type"], config["target_modules"]) == ("BEFT", modules)
    tensors = load_file(path / "adapter_model.safetensors")
    assert {name: list(x.shape) for name, x in tensors.items()} == {
        f"base_model.model.{module}.beft_bias": [1, lm.d_model] for module in modules
    }
    assert json.loads((path / "sae_persona.json").read_text())["model"]["config_hash"] == lm.config_hash


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("Gemma2", "the model changes what its blocks write before it adds it"),
        ("GPT2", "wraps Linear modules, transformer.h.1.mlp.c_proj is a Conv1D"),
        ("Mixtral", "the blocks of tiny-Mixtral have none"),
    ],
)
def test_models_in_which_it_would_do_something_else_are_refused(make_lm, tmp_path, family, message):
    lm = make_lm(family)
    made = Intervention.of(lm, None, [Steer(torch.arange(32.0).sin(), 1.0)], hook=HookPoint(1), positions="every")
    with pytest.raises(ConfigError, match=message):
        peft_adapter.write(made, lm, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_folders_of_others_are_not_replaced(lm, sums, tmp_path):
    path = peft_adapter.write(sums, lm, tmp_path / "adapter")
    peft_adapter.write(sums, lm, path)  # an adapter may be
    (path / "adapter_config.json").unlink()
    with pytest.raises(Exception, match="is a folder with other things in it"):
        peft_adapter.write(sums, lm, path)
