import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_persona.errors import FormatError
from sae_persona.sae.formats import CONFIG, WEIGHTS, hook_metadata, is_sae, load_sae, sae_facts, save_sae
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Threshold, TopK
from sae_persona.types import HookPoint

D_IN, N_LATENTS = 8, 40
RULES = {"topk": TopK(5), "standard": ReLU(), "jumprelu": Threshold(torch.linspace(-0.5, 1, N_LATENTS))}


def make(rule) -> SAE:
    generator = torch.Generator().manual_seed(0)
    shapes = ((N_LATENTS, D_IN), (N_LATENTS,), (N_LATENTS, D_IN), (D_IN,))
    w_enc, b_enc, w_dec, b_dec = (torch.randn(*s, generator=generator) for s in shapes)
    return SAE(w_enc, b_enc, torch.nn.functional.normalize(w_dec, dim=1), b_dec, rule, {"l0": 4.5})


def tokens(n=50) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_what_is_saved_is_what_is_loaded(rule, tmp_path):
    sae = make(rule)
    save_sae(sae, tmp_path / "sae", metadata={"hook": "layers.1.resid_post"})
    again = load_sae(tmp_path / "sae")
    assert again.metadata["l0"] == 4.5 and again.metadata["hook"] == "layers.1.resid_post"
    assert type(again.rule) is type(rule)
    x = tokens()
    torch.testing.assert_close(again.encode(x).dense(N_LATENTS), sae.encode(x).dense(N_LATENTS))
    torch.testing.assert_close(again.decode(again.encode(x)), sae.decode(sae.encode(x)))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_saving_and_loading_is_exact_to_the_bit(rule, tmp_path):
    wide = torch.nn.functional.normalize(torch.randn(50, 3000), dim=1)  # whose norms are 1 within rounding only
    threshold = Threshold(torch.rand(50)) if isinstance(rule, Threshold) else rule
    sae = SAE(torch.randn(50, 3000), torch.randn(50), wide, torch.randn(3000), threshold)
    assert (wide.norm(dim=1) != 1).any()
    save_sae(sae, tmp_path / "sae")
    assert load_sae(tmp_path / "sae").fingerprint == sae.fingerprint


def test_saving_replaces_what_was_there_whole(tmp_path):
    save_sae(make(TopK(5)), tmp_path / "sae")
    save_sae(make(ReLU()), tmp_path / "sae")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [CONFIG, "sae", WEIGHTS]
    assert isinstance(load_sae(tmp_path / "sae").rule, ReLU)


@pytest.mark.parametrize(
    ("hook", "hook_name", "hf_hook_name"),
    [
        ("2", "blocks.2.hook_resid_post", "model.layers.2"),
        ("2.resid_pre", "blocks.2.hook_resid_pre", "model.layers.1"),
        ("0.resid_pre", "blocks.0.hook_resid_pre", None),
    ],
)
def test_metadata_names_the_hook_in_every_tongue(hook, hook_name, hf_hook_name):
    class Named:
        name, blocks_path = "tiny", "model.layers"

    found = hook_metadata(Named(), HookPoint.parse(f"layers.{hook}"))  # pyright: ignore[reportArgumentType]
    assert found["hook_name"] == hook_name and found.get("hf_hook_name") == hf_hook_name
    assert found["model"] == found["model_name"] == "tiny" and HookPoint.parse(found["hook"])


def test_the_hook_of_a_file_from_elsewhere_is_read_off_its_name(tmp_path):
    save_sae(make(TopK(5)), tmp_path / "theirs", metadata={"hook_name": "blocks.3.hook_resid_pre"})
    assert load_sae(tmp_path / "theirs").hook == HookPoint(3, "resid_pre")
    save_sae(make(TopK(5)), tmp_path / "mlp", metadata={"hook_name": "blocks.3.hook_mlp_out"})
    with pytest.raises(FormatError, match="hook point"):
        _ = load_sae(tmp_path / "mlp").hook


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


BREAK = {
    "no folder": (lambda f: (f / CONFIG).unlink(), "no SAE config at"),
    "not json": (lambda f: (f / CONFIG).write_text("{"), "is not a SAE config"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "is not an SAE config"),
    "another architecture": (lambda f: edit_config(f, architecture="temporal"), "this version reads standard, topk"),
    "normalised": (lambda f: edit_config(f, normalize_activations="layer_norm"), "which no weights can hold"),
    "no k": (lambda f: edit_config(f, k=None), "needs k between 1 and 40"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "cannot read the SAE weights"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:200]), "cannot read the SAE weights"),
    "a tensor missing": (lambda f: edit_weights(f, lambda t: t.pop("b_enc")), "must hold W_enc, W_dec, b_enc, b_dec"),
    "another width": (lambda f: edit_config(f, d_in=9), r"W_enc must be \[9, 40\]"),
    "nan": (lambda f: edit_weights(f, lambda t: t["b_dec"].fill_(torch.nan)), "b_dec has NaN"),
}


@pytest.mark.parametrize(("damage", "message"), BREAK.values(), ids=BREAK.keys())
def test_a_folder_that_cannot_be_read_is_a_format_error_of_one_line(damage, message, tmp_path):
    save_sae(make(TopK(5)), tmp_path / "sae")
    damage(tmp_path / "sae")
    with pytest.raises(FormatError, match=message) as caught:
        load_sae(tmp_path / "sae")
    assert "\n" not in str(caught.value)


def test_facts_are_read_from_the_config_alone(tmp_path):
    assert not is_sae(tmp_path)
    told = {"model": "tiny", "hook": "layers.1.resid_post", "n_tokens": 7, "training": {"k": 3}}
    save_sae(make(RULES["jumprelu"]), tmp_path / "sae", metadata=told)
    (tmp_path / "sae" / WEIGHTS).unlink()
    assert is_sae(tmp_path / "sae")
    assert sae_facts(tmp_path / "sae") == {
        "format": "SAELens",
        "architecture": "jumprelu",
        "d_in": D_IN,
        "d_out": D_IN,
        "n_latents": N_LATENTS,
        "k": 3,
        "hook": "layers.1.resid_post",
        "model": "tiny",
        "l0": 4.5,
        "tokens": 7,
        "dead": None,
        "normalisation": "none",
        "dtype": "float32",
    }
