import json

import pytest
import torch
from safetensors.torch import load_file

from sae_persona.errors import ConfigError
from sae_persona.sae.formats import load_sae
from sae_persona.steering.export import native, saelens_features
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Ablate, Add, Ceiling, Clamp


def spliced(x, folder):
    """The edits by the folder alone, in SAELens' words: encode, set features, decode, add what it could not rebuild."""
    w = load_file(folder / "sae_weights.safetensors")
    pre = x @ w["W_enc"] + w["b_enc"]
    f = pre * (pre > w["threshold"])
    new = f.clone()
    for one in json.loads((folder / "features.json").read_text())["features"]:
        low, high = (float(sign) if one[k] is None else one[k] for k, sign in (("low", "-inf"), ("high", "inf")))
        new[..., one["feature"]] = (one["slope"] * f[..., one["feature"]] + one["shift"]).clamp(low, high)
    return new @ w["W_dec"] + w["b_dec"] + (x - (f @ w["W_dec"] + w["b_dec"]))


def test_the_folder_alone_says_what_the_edits_do(lm, sae, edited, logits, tmp_path):
    edits = [Clamp(3, 1.5, 4.0), Ablate(8), Add(11, 0.5, 3.0), Ceiling(12, 0.1, 2.0)]
    made = Intervention.of(lm, sae, edits, positions="every")
    folder = saelens_features.write(made, lm, tmp_path / "sae")
    assert load_sae(folder).fingerprint == sae.fingerprint
    handle = lm.blocks[sae.hook.layer].register_forward_hook(lambda _, args, out: spliced(out, folder))
    try:
        found = logits(lm)
    finally:
        handle.remove()
    torch.testing.assert_close(found, edited(lm, made), atol=1e-5, rtol=0)
    listed = json.loads((folder / "features.json").read_text())
    assert (listed["hook_name"], listed["hf_hook_name"]) == ("blocks.2.hook_resid_post", "model.layers.2")


def test_rows_of_an_sae_are_not_enough(lm, sae, tmp_path):
    native.export(tmp_path / "x.json", lm, sae, [Ablate(8)])
    with pytest.raises(ConfigError, match="holds a whole SAE, and the file has rows of one: pass the SAE too"):
        saelens_features.write(native.load_intervention(tmp_path / "x.json"), lm, tmp_path / "sae")
    whole = native.load_intervention(tmp_path / "x.json", sae)
    assert load_sae(saelens_features.write(whole, lm, tmp_path / "sae")).n_latents == sae.n_latents
