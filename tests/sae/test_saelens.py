"""SAELens folders written by hand, read, and compared with the formula of their architecture."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_persona.errors import FormatError, ModelError
from sae_persona.sae.formats import load_sae, save_sae
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Threshold, TopK
from sae_persona.types import HookPoint

D_IN, D_OUT, N = 8, 6, 40


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def numbers(seed=0, d_out=D_IN) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_IN, N), "W_dec": (N, d_out), "b_enc": (N,), "b_dec": (d_out,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def tokens(n=50) -> Tensor:
    return 3 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    config = {"d_in": D_IN, "d_sae": N, "dtype": "float32", "apply_b_dec_to_input": False, **config}
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def pairs_close(sae: SAE, x: Tensor, acts: Tensor, rebuilt: Tensor) -> None:
    """``acts`` are the file's; ours are they times the norms that its decoder rows had."""
    latents = sae.encode(x)
    close(sae.decode(latents), rebuilt)
    assert ((latents.dense(N) > 0) == (acts > 0)).all() and 0 < (acts > 0).float().mean() < 1


# which transcoder has which tensors
TRANSCODERS = {
    "transcoder": (False, False),
    "skip_transcoder": (False, True),
    "jumprelu_transcoder": (True, False),
    "jumprelu_skip_transcoder": (True, True),
}


@pytest.mark.parametrize(("architecture", "parts"), TRANSCODERS.items(), ids=TRANSCODERS.keys())
def test_transcoders_predict_another_place_and_come_back_as_they_went(architecture, parts, tmp_path):
    jumps, skips = parts
    t, x = numbers(d_out=D_OUT), tokens()
    threshold, w_skip = torch.linspace(-0.5, 4, N), torch.randn(D_OUT, D_IN)
    more = ({"threshold": threshold} if jumps else {}) | ({"W_skip": w_skip} if skips else {})
    config = {"architecture": architecture, "d_out": D_OUT, "apply_b_dec_to_input": True}  # which means nothing here
    sae = load_sae(write(tmp_path / "t", t | more, **config))
    pre = x @ t["W_enc"] + t["b_enc"]
    acts = pre.relu() * (pre > threshold) if jumps else pre.relu()
    pairs_close(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])
    close(sae.predict(x), acts @ t["W_dec"] + t["b_dec"] + (x @ w_skip.T if skips else 0))
    assert sae.transcodes and (sae.d_in, sae.d_out) == (D_IN, D_OUT)
    save_sae(sae, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "cfg.json").read_text())["architecture"] == architecture
    again = load_sae(tmp_path / "again")
    assert again.transcodes and again.predict(x).equal(sae.predict(x))


def test_a_transcoder_is_not_taken_for_an_sae(tmp_path):
    sae = load_sae(write(tmp_path / "t", numbers(), architecture="transcoder", d_out=D_IN))
    with pytest.raises(ModelError, match="is a transcoder: it predicts another place"):
        sae.check_rebuilds()
    with pytest.raises(FormatError, match="no TopK transcoder"):
        save_sae(SAE(sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec, TopK(3), transcodes=True), tmp_path / "u")
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize("b_dec_to_input", [True, False], ids=["x - b_dec", "x"])
def test_gated(b_dec_to_input, tmp_path):
    t, x = numbers(), tokens()
    del t["b_enc"]
    gates = dict(zip(("b_gate", "b_mag", "r_mag"), torch.randn(3, N), strict=True))
    sae = load_sae(write(tmp_path / "g", t | gates, architecture="gated", apply_b_dec_to_input=b_dec_to_input))
    within = (x - t["b_dec"] * b_dec_to_input) @ t["W_enc"]
    magnitude = within * gates["r_mag"].exp() + gates["b_mag"]
    acts = (within + gates["b_gate"] > 0) * magnitude.relu()
    pairs_close(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])
    close(sae.encode(x).dense(N), acts * t["W_dec"].norm(dim=1))


@pytest.mark.parametrize("rescaled", [True, False], ids=["rescaled", "as is"])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_checkpoint_of_batch_topk_fires_above_what_it_learnt(architecture, rescaled, tmp_path):
    t, x, level, scale = numbers(), tokens(), 2.5, 0.37
    config = {"k": 5.5, "rescale_acts_by_decoder_norm": rescaled, "architecture": architecture}
    learnt = {"topk_threshold": torch.tensor(level, dtype=torch.float64)}
    folder = write(tmp_path / "b", t | learnt, normalize_activations="expected_average_only_in", **config)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale, "has_whitening": False}))
    norms = t["W_dec"].norm(dim=1)
    pre = (x * scale) @ t["W_enc"] + t["b_enc"]
    seen = pre * norms if rescaled else pre
    acts = pre.relu() * (seen > level)
    sae = load_sae(folder)
    pairs_close(sae, x, acts, (acts @ t["W_dec"] + t["b_dec"]) / scale)
    assert isinstance(sae.rule, Threshold)
    write(folder, t | {"topk_threshold": torch.tensor(0.0)}, **config)
    with pytest.raises(FormatError, match="threshold was never trained"):
        load_sae(folder)


@pytest.mark.parametrize("rescaled", [True, False], ids=["rescaled", "as is"])
@pytest.mark.parametrize("scale", [None, 0.2], ids=["whitened", "scaled and whitened"])
def test_a_checkpoint_that_was_whitened(scale, rescaled, tmp_path):
    """With topk: unwhitening changes the norms of the decoder's rows, which must not change who fires."""
    t, x = numbers(), tokens()
    mean, matrix = torch.randn(D_IN).double(), (torch.randn(D_IN, D_IN) + 5 * torch.eye(D_IN)).double()
    whitening = {"mean": mean, "matrix": matrix, "inverse_matrix": matrix.inverse().contiguous()}
    config = {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": rescaled, "apply_b_dec_to_input": True}
    folder = write(tmp_path / "w", t, normalize_activations="covariance_whitening", **config)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale, "has_whitening": True}))
    save_file(whitening, folder / "activation_whitening.safetensors")
    t = {name: tensor.double() for name, tensor in t.items()}
    norms = t["W_dec"].norm(dim=1) if rescaled else torch.ones(N).double()
    z = (x * (scale or 1) - mean) @ matrix
    pre = ((z - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
    kept = pre >= pre.topk(5, dim=1).values[:, -1:]
    acts = pre.relu() * kept
    rebuilt = ((acts / norms) @ t["W_dec"] + t["b_dec"]) @ matrix.inverse() + mean
    pairs_close(load_sae(folder), x, acts, (rebuilt / (scale or 1)).float())
    (folder / "activation_whitening.safetensors").unlink()
    with pytest.raises(FormatError, match="cannot read the SAE weights .*activation_whitening"):
        load_sae(folder)


def test_a_scale_that_is_not_told_is_asked_for(tmp_path):
    folder = write(tmp_path / "s", numbers(), architecture="standard", normalize_activations="expected_average_only_in")
    with pytest.raises(FormatError, match="not folded into the weights: copy activation_scaler.json"):
        load_sae(folder)
    for factor in (None, 0, "x"):
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
        with pytest.raises(FormatError, match="a scaling_factor above 0, got"):
            load_sae(folder)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_what_no_weights_can_hold_is_refused(kind, tmp_path):
    with pytest.raises(FormatError, match="which no weights can hold: use an SAE that was trained with none"):
        load_sae(write(tmp_path / "n", numbers(), architecture="standard", normalize_activations=kind))


def test_an_old_jumprelu_checkpoint_has_log_thresholds(tmp_path):
    logs = torch.linspace(-2, 1, N)
    sae = load_sae(write(tmp_path / "j", numbers() | {"log_threshold": logs}, architecture="jumprelu"))
    assert isinstance(sae.rule, Threshold)
    close(sae.rule.threshold, logs.exp() * numbers()["W_dec"].norm(dim=1))


def test_a_config_from_before_6(tmp_path):
    """Hook and model at the top level, k among the arguments of the activation, a flag for the normalisation."""
    more = {"scaling_factor": torch.ones(N)}
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": False}
    place = {"hook_point": "blocks.3.hook_resid_pre", "model_name": "gpt2"}
    sae = load_sae(write(tmp_path / "o", numbers() | more, **old, **place))
    assert sae.rule == TopK(4) and sae.hook == HookPoint(3, "resid_pre") and sae.metadata["model_name"] == "gpt2"
    sae = load_sae(write(tmp_path / "p", numbers()))
    assert isinstance(sae.rule, ReLU)
    with pytest.raises(FormatError, match="must hold .*, got .*scaling_factor"):
        load_sae(write(tmp_path / "q", numbers() | {"scaling_factor": 2 * torch.ones(N)}))


@pytest.mark.parametrize("name", ["model.layers.7", "transformer.h.7"])
def test_a_block_of_hugging_face_is_a_hook_point(name, tmp_path):
    folder = write(tmp_path / "h", numbers(), architecture="standard", metadata={"hook_name": name})
    assert load_sae(folder).hook == HookPoint(7, "resid_post")
    folder = write(tmp_path / "m", numbers(), architecture="standard", metadata={"hook_name": f"{name}.mlp"})
    with pytest.raises(FormatError, match="hook point"):
        _ = load_sae(folder).hook


@pytest.mark.parametrize("architecture", ["temporal", "matching_pursuit", "abstopk", None, ["standard"]])
def test_other_architectures_are_refused_by_name(architecture, tmp_path):
    with pytest.raises(FormatError, match="this version reads standard, topk, jumprelu, gated, transcoder"):
        load_sae(write(tmp_path / "x", numbers(), architecture=architecture))


BAD = {
    "heads": ({"reshape_activations": "hook_z"}, {}, r"reads attention heads \(hook_z\)"),
    "no width out": ({"architecture": "transcoder"}, {}, "d_out must be numbers"),
    "no gates": ({"architecture": "gated"}, {}, r"must hold W_enc, W_dec, b_dec, b_gate, b_mag, r_mag \(gated\)"),
    "a row of thresholds": (
        {"architecture": "jumprelu"},
        {"threshold": torch.zeros(N, 1)},
        r"threshold must be \[40\]",
    ),
    "scaled transcoder": (
        {"architecture": "transcoder", "d_out": D_IN, "normalize_activations": "expected_average_only_in"},
        {},
        "is a transcoder with normalize_activations",
    ),
    "infinite": ({}, {"b_dec": torch.full((D_IN,), torch.inf)}, "b_dec has NaN or infinite values"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), BAD.values(), ids=BAD.keys())
def test_bad_folders(config, tensors, message, tmp_path):
    with pytest.raises(FormatError, match=message) as caught:
        load_sae(write(tmp_path / "bad", numbers() | tensors, **{"architecture": "standard", **config}))
    assert "\n" not in str(caught.value)
