"""dictionary_learning folders written by hand, and the formula of each of its classes."""

import json
import os

import pytest
import torch
from torch import Tensor

from sae_persona.errors import FormatError
from sae_persona.sae.formats import is_sae, load_sae, sae_facts
from sae_persona.types import HookPoint

D_IN, N, K, LEVEL = 6, 24, 3, 1.5


def linear(bias: str | None) -> dict[str, Tensor]:
    encoder = {"encoder.weight": torch.randn(N, D_IN), "encoder.bias": torch.randn(N)}
    decoder = {"decoder.weight": torch.randn(D_IN, N)}
    return encoder | decoder | ({bias: torch.randn(D_IN)} if bias else {})


def plain(**more) -> dict[str, Tensor]:
    weights = {"W_enc": torch.randn(D_IN, N), "b_enc": torch.randn(N)}
    return weights | {"W_dec": torch.randn(N, D_IN), "b_dec": torch.randn(D_IN)} | more


def kinds() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    numbers = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(LEVEL)}
    ungated = linear("decoder_bias")
    del ungated["encoder.bias"]
    return {
        "AutoEncoder": linear("bias"),
        "AutoEncoderNew": linear("decoder.bias"),
        "AutoEncoderTopK": linear("b_dec") | numbers,
        "BatchTopKSAE": linear("b_dec") | numbers,
        "MatryoshkaBatchTopKSAE": plain(**numbers, group_sizes=torch.tensor([4, 20])),
        "JumpReluAutoEncoder": plain(threshold=torch.linspace(-1, 3, N)),
        "GatedAutoEncoder": ungated | {name: torch.randn(N) for name in ("r_mag", "gate_bias", "mag_bias")},
    }


def formula(kind: str, t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations before any scaling by decoder norms, and the reconstruction, of each class."""
    w_dec = t["W_dec"] if "W_dec" in t else t["decoder.weight"].T
    b_dec = next(t[name] for name in ("bias", "decoder.bias", "decoder_bias", "b_dec") if name in t)
    z = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - b_dec
    within = z @ (t["W_enc"] if "W_enc" in t else t["encoder.weight"].T)
    if kind == "GatedAutoEncoder":
        magnitude = within * t["r_mag"].exp() + t["mag_bias"]
        acts = (within + t["gate_bias"] > 0) * magnitude.relu()
    else:
        pre = within + t["b_enc" if "b_enc" in t else "encoder.bias"]
        acts = pre.relu()
        if kind == "AutoEncoderTopK":
            acts = acts * (pre >= pre.topk(K, dim=1).values[:, -1:])
        elif "threshold" in t:
            acts = acts * (pre > t["threshold"])
    return acts, acts @ w_dec + b_dec


def write(folder, kind, tensors, **trainer):
    folder.mkdir(exist_ok=True)
    told = {"dict_class": kind, "activation_dim": D_IN, "dict_size": N, "k": K, "lm_name": "gpt2", "layer": 4}
    told |= {"submodule_name": "resid_post_layer_4", **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": told, "buffer": {"ctx_len": 128}}))
    torch.save(tensors, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("kind", kinds())
def test_each_class_computes_what_it_does_there(kind, tmp_path):
    t = kinds()[kind]
    sae, x = load_sae(write(tmp_path / "d", kind, t)), 2 * torch.randn(40, D_IN)
    acts, rebuilt = formula(kind, t, x)
    latents = sae.encode(x)
    torch.testing.assert_close(sae.decode(latents), rebuilt, atol=1e-4, rtol=1e-4)
    assert ((latents.dense(N) > 0) == (acts > 0)).all() and 0 < (acts > 0).float().mean() < 1
    assert sae.hook == HookPoint(4, "resid_post") and sae.metadata["model"] == "gpt2"


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_trained_is_refused(kind, tmp_path):
    with pytest.raises(FormatError, match=r"threshold was never trained \(-1\)"):
        load_sae(write(tmp_path / "d", kind, kinds()[kind] | {"threshold": torch.tensor(-1.0)}))


def test_topk_of_an_older_version_has_no_threshold(tmp_path):
    t = kinds()["AutoEncoderTopK"]
    del t["threshold"]
    assert load_sae(write(tmp_path / "d", "AutoEncoderTopK", t)).n_latents == N


def test_the_hook_point_is_told_by_the_submodules_name_only(tmp_path):
    folder = write(tmp_path / "d", "AutoEncoder", kinds()["AutoEncoder"], submodule_name=None)
    with pytest.raises(FormatError, match="hook point"):  # layer 4 of what?
        _ = load_sae(folder).hook
    write(folder, "AutoEncoder", kinds()["AutoEncoder"], submodule_name="resid_pre_layer_4")
    assert load_sae(folder).hook == HookPoint(4, "resid_pre")


def test_facts_need_no_weights(tmp_path):
    folder = write(tmp_path / "d", "BatchTopKSAE", {})
    (folder / "ae.pt").unlink()
    found = sae_facts(folder)
    assert (found["format"], found["architecture"], found["k"]) == ("dictionary_learning", "batchtopk", K)
    assert (found["n_latents"], found["hook"], found["model"]) == (N, "layers.4.resid_post", "gpt2")


def test_a_language_models_config_is_no_sae(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_sae(tmp_path)
    with pytest.raises(FormatError, match="no SAE config at"):
        load_sae(tmp_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "d", "AutoEncoder", {"bias": Evil()})
    with pytest.raises(FormatError, match="a pickle may hold code, so it is not read") as caught:
        load_sae(folder)
    assert "\n" not in str(caught.value) and not (tmp_path / "was-run").exists()


def kept(**changes):
    return lambda t: {name: tensor for name, tensor in (t | changes).items() if tensor is not None}


BAD = {
    "another class": (
        {"dict_class": "CrossCoder"},
        kept(),
        "has dict_class 'CrossCoder', this version reads AutoEncoder",
    ),
    "no k": ({"k": 0}, kept(), "needs k between 1 and 24, got 0"),
    "no size": ({"dict_size": None}, kept(), "activation_dim and dict_size must be numbers"),
    "a tensor missing": ({}, kept(b_dec=None), r"must hold encoder.weight.*b_dec \(AutoEncoderTopK\)"),
    "another width": ({"activation_dim": 7}, kept(), r"encoder.weight must be \[24, 7\]"),
    "nan": ({}, kept(b_dec=torch.full((D_IN,), torch.nan)), "b_dec has NaN"),
    "no tensors": ({}, lambda t: {"b_dec": 3}, "must hold a state dict"),
    "a list": ({}, lambda t: [1], "got list"),
}


@pytest.mark.parametrize(("trainer", "change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_folders(trainer, change, message, tmp_path):
    kind = "AutoEncoderTopK"
    with pytest.raises(FormatError, match=message) as caught:
        load_sae(write(tmp_path / "d", kind, change(kinds()[kind]), **trainer))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"no pickle at all"], ids=["missing", "empty", "text"])
def test_weights_that_are_none(content, tmp_path):
    folder = write(tmp_path / "d", "AutoEncoder", {})
    (folder / "ae.pt").unlink()
    if content is not None:
        (folder / "ae.pt").write_bytes(content)
    with pytest.raises(FormatError, match="ae.pt"):
        load_sae(folder)
