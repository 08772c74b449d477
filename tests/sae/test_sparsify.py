"""sparsify folders written by hand, and the formula of its encoder."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sae_persona.errors import FormatError
from sae_persona.sae.formats import load_sae, sae_facts
from sae_persona.sae.sparsity import TopK
from sae_persona.types import HookPoint

D_IN, N, K = 6, 24, 3


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    w_dec = torch.nn.functional.normalize(torch.randn(N, D_IN), dim=1)
    weights = {"encoder.weight": torch.randn(N, D_IN), "encoder.bias": torch.randn(N)}
    return weights | {"W_dec": w_dec, "b_dec": torch.randn(D_IN), "W_skip": torch.randn(D_IN, D_IN)}


def write(folder, tensors, *, skip=False, **config):
    folder.mkdir(parents=True, exist_ok=True)
    told = {"activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": K}
    told |= {"multi_topk": False, "skip_connection": skip, "transcode": False, "d_in": D_IN, **config}
    (folder / "cfg.json").write_text(json.dumps(told))
    save_file({n: t for n, t in tensors.items() if skip or n != "W_skip"}, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("transcode", [False, True], ids=["sae", "transcoder"])
def test_it_computes_what_sparsify_does(transcode, skip, tensors, tmp_path):
    sae = load_sae(write(tmp_path / "layers.10", tensors, skip=skip, transcode=transcode))
    x = 2 * torch.randn(40, D_IN)
    pre = (x - (0 if transcode else tensors["b_dec"])) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    acts = pre.relu() * (pre >= pre.topk(K, dim=1).values[:, -1:])
    torch.testing.assert_close(sae.encode(x).dense(N), acts, atol=1e-5, rtol=1e-5)
    wanted = acts @ tensors["W_dec"] + tensors["b_dec"] + (x @ tensors["W_skip"].T if skip else 0)
    torch.testing.assert_close(sae.predict(x), wanted, atol=1e-5, rtol=1e-5)
    assert sae.rule == TopK(K) and sae.transcodes == transcode


def test_the_folder_names_the_hook_point_and_the_run_the_model(tensors, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m"}))
    sae = load_sae(write(tmp_path / "layers.10", tensors))
    assert sae.hook == HookPoint(10, "resid_post") and sae.metadata["model"] == "EleutherAI/pythia-160m"
    for folder, config in (("layers.10.mlp", {}), ("layers.10", {"transcode": True})):
        with pytest.raises(FormatError, match="hook point"):
            _ = load_sae(write(tmp_path / folder, tensors, **config)).hook


def test_num_latents_is_taken_where_it_is_told(tensors, tmp_path):
    assert load_sae(write(tmp_path / "a", tensors, num_latents=N, expansion_factor=32)).n_latents == N
    with pytest.raises(FormatError, match=r"encoder.weight must be \[192, 6\]"):
        load_sae(write(tmp_path / "b", tensors, expansion_factor=32))


def test_facts_need_no_weights(tensors, tmp_path):
    folder = write(tmp_path / "layers.3", tensors, skip=True, transcode=True)
    (folder / "sae.safetensors").unlink()
    found = sae_facts(folder)
    assert (found["format"], found["architecture"], found["n_latents"]) == ("sparsify", "topk skip transcoder", N)
    assert (found["k"], found["d_in"], found["hook"]) == (K, D_IN, "layers.3")


BAD = {
    "groupmax": ({"activation": "groupmax"}, {}, "only topk is read"),
    "embed_skip": ({"embed_skip": True}, {}, "has embed_skip: it reads more"),
    "no k": ({"k": None}, {}, "needs k between 1 and 24"),
    "no width": ({"d_in": "six"}, {}, "d_in must be numbers"),
    "no size": ({"num_latents": 0, "expansion_factor": 0}, {}, "expansion_factor must be numbers"),
    "shape": ({}, {"b_dec": torch.zeros(7)}, r"b_dec must be \[6\]"),
    "nan": ({}, {"b_dec": torch.full((6,), torch.nan)}, "b_dec has NaN"),
    "unknown": ({}, {"extra": torch.zeros(1)}, "must hold encoder.weight"),
}


@pytest.mark.parametrize(("config", "changed", "message"), BAD.values(), ids=BAD.keys())
def test_bad_folders(config, changed, message, tensors, tmp_path):
    with pytest.raises(FormatError, match=message) as caught:
        load_sae(write(tmp_path / "layers.1", tensors | changed, **config))
    assert "\n" not in str(caught.value)


def test_missing_weights(tensors, tmp_path):
    folder = write(tmp_path / "layers.1", tensors)
    (folder / "sae.safetensors").unlink()
    with pytest.raises(FormatError, match="cannot read the SAE weights"):
        load_sae(folder)
