import json
import math

import pytest
import torch

from sae_persona.errors import ConfigError, FormatError
from sae_persona.steering.export import neuronpedia
from sae_persona.steering.export.approximate import approximate
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Clamp, Steer
from sae_persona.types import HookPoint


@pytest.mark.parametrize("hook", [HookPoint(2), HookPoint(3, "resid_pre"), HookPoint(0, "resid_pre")])
def test_strength_times_vector_at_its_place_is_what_the_edits_do(lm, edited, logits, tmp_path, hook):
    direction = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(7))
    made = Intervention.of(lm, None, [Steer(direction, 0.4)], hook=hook, positions="every")
    raw = json.loads(neuronpedia.write(made, lm, tmp_path / "x.json").read_text())
    added = raw["vectorDefaultSteerStrength"] * torch.tensor(raw["vector"])
    block = lm.blocks[raw["layerNumber"]]
    if raw["hookType"] == "hook_resid_pre":
        handle = block.register_forward_pre_hook(lambda _, args: (args[0] + added, *args[1:]))
    else:
        handle = block.register_forward_hook(lambda _, args, out: out + added)
    try:
        found = logits(lm)
    finally:
        handle.remove()
    torch.testing.assert_close(found, edited(lm, made), atol=1e-5, rtol=0)


def test_the_schema_is_checked(lm, one_sum, tmp_path):
    raw = json.loads(neuronpedia.write(one_sum, lm, tmp_path / "x.json").read_text())
    neuronpedia.check(raw, lm.d_model)
    assert raw["modelId"] == "lab" and "latent 3" in raw["vectorLabel"]
    for changed, message in (
        ({"vector": raw["vector"][1:]}, "has 128 finite numbers, at most 24576, got 127"),
        ({"vector": [math.nan, *raw["vector"][1:]]}, "finite numbers"),
        ({"layerNumber": "2"}, "layerNumber has another type"),
        ({"layerNumber": True}, "layerNumber has another type"),
        ({"layerNumber": -1}, "has no place"),
        ({"hookType": "hook_mlp_out"}, "has no place 'hook_mlp_out'"),
        ({"vectorDefaultSteerStrength": 200}, "is from -100 to 100, got 200"),
        ({"extra": 1}, "has the keys modelId"),
    ):
        with pytest.raises(FormatError, match=message):
            neuronpedia.check({**raw, **changed}, lm.d_model)


def test_a_strength_of_nothing_is_refused(lm, sae, tmp_path):
    made = Intervention.of(lm, None, [Steer(torch.ones(lm.d_model), 0.0)], hook=HookPoint(2), positions="every")
    with pytest.raises(ConfigError, match="has norm 0: give them a strength"):
        neuronpedia.write(made, lm, tmp_path / "x.json")


def test_what_is_lost_stands_in_the_label(lm, sae, prompts, tmp_path):
    made = approximate(Intervention.of(lm, sae, [Clamp(3, 20.0, 6.0)]), lm, prompts[:2], prompts[2:4])
    label = json.loads(neuronpedia.write(made, lm, tmp_path / "x.json").read_text())["vectorLabel"]
    assert label.startswith("steer (stands for clamp at answer: explains ") and "nats" in label
