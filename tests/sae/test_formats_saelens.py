"""Files to and from SAELens itself. Its import takes 7 seconds, so it has this module to itself."""

import pytest
import torch
from torch import Tensor

from sae_persona.sae.formats import load_sae, save_sae
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Threshold, TopK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # SAELens' dependencies warn as they are imported
]
D_IN, N_LATENTS = 8, 40
RULES = {"topk": TopK(5), "standard": ReLU(), "jumprelu": Threshold(torch.linspace(-0.5, 1, N_LATENTS))}


@pytest.fixture(scope="module")
def sae_lens():
    import sae_lens

    return sae_lens


def tokens(n=50) -> Tensor:
    return 3 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


def parameters(seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_IN, N_LATENTS), "W_dec": (N_LATENTS, D_IN), "b_enc": (N_LATENTS,), "b_dec": (D_IN,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_saelens_loads_ours(rule, sae_lens, tmp_path):
    p, x = parameters(), tokens()
    sae = SAE(p["W_enc"].T, p["b_enc"], torch.nn.functional.normalize(p["W_dec"], dim=1), p["b_dec"], rule)
    save_sae(sae, tmp_path / "sae", metadata={"hook_name": "blocks.1.hook_resid_post", "nested": {"k": 1}})
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    latents = sae.encode(x)
    torch.testing.assert_close(theirs.encode(x), latents.dense(N_LATENTS), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(x), sae.decode(latents), atol=1e-5, rtol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post" and theirs.cfg.metadata.nested == {"k": 1}


@pytest.mark.parametrize("b_dec_to_input", [True, False], ids=["x - b_dec", "x"])
@pytest.mark.parametrize("kind", ["standard", "topk", "topk rescaled", "jumprelu"])
def test_we_load_what_saelens_wrote(kind, b_dec_to_input, sae_lens, tmp_path):
    name = {"standard": "StandardSAE", "jumprelu": "JumpReLUSAE"}.get(kind, "TopKSAE")
    more = {"k": 5, "rescale_acts_by_decoder_norm": kind == "topk rescaled"} if kind.startswith("topk") else {}
    config = getattr(sae_lens, f"{name}Config")(d_in=D_IN, d_sae=N_LATENTS, apply_b_dec_to_input=b_dec_to_input, **more)
    theirs = getattr(sae_lens, name)(config)
    given = parameters() | ({"threshold": RULES["jumprelu"].threshold} if kind == "jumprelu" else {})
    theirs.load_state_dict(given)
    theirs.save_model(tmp_path / "sae")

    ours, x = load_sae(tmp_path / "sae"), tokens()
    latents = ours.encode(x)
    torch.testing.assert_close(ours.decode(latents), theirs(x), atol=1e-5, rtol=1e-5)
    norms = given["W_dec"].norm(dim=1)
    # rows of norm 1 and activations in units of the residual stream, except where that would change who fires
    unit = torch.ones(N_LATENTS) if kind != "topk" else norms
    torch.testing.assert_close(ours.w_dec.norm(dim=1), unit)
    scale = norms if kind in ("standard", "jumprelu") else 1
    torch.testing.assert_close(latents.dense(N_LATENTS), theirs.encode(x) * scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind", ["GatedSAE", "Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"]
)
def test_we_load_the_other_kinds_too(kind, sae_lens, tmp_path):
    torch.manual_seed(0)
    import sae_lens.saes.transcoder as transcoders

    home = sae_lens if kind == "GatedSAE" else transcoders
    more = {} if kind == "GatedSAE" else {"d_out": 6, "apply_b_dec_to_input": False}
    theirs = getattr(home, kind)(getattr(home, f"{kind}Config")(d_in=D_IN, d_sae=N_LATENTS, **more))
    theirs.load_state_dict({name: torch.randn_like(tensor) for name, tensor in theirs.state_dict().items()})
    theirs.save_model(tmp_path / "sae")
    ours, x = load_sae(tmp_path / "sae"), tokens()
    torch.testing.assert_close(ours.predict(x), theirs(x), atol=1e-5, rtol=1e-5)
    acts = theirs.encode(x) * theirs.W_dec.norm(dim=1)
    torch.testing.assert_close(ours.encode(x).dense(N_LATENTS), acts, atol=1e-5, rtol=1e-5)
    if kind != "GatedSAE":
        save_sae(ours, tmp_path / "again")
        again = sae_lens.SAE.load_from_disk(tmp_path / "again")
        assert type(again) is type(theirs)
        torch.testing.assert_close(again(x), theirs(x), atol=1e-5, rtol=1e-5)


TRAINED = [f"{kind}{how}" for kind in ("BatchTopK", "MatryoshkaBatchTopK", "TopK") for how in ("", " rescaled")]


@pytest.mark.parametrize("kind", [*TRAINED, "JumpReLU", "Gated", "Standard"])
@pytest.mark.parametrize("normalised", ["none", "scaled", "whitened"])
def test_a_checkpoint_is_what_saelens_would_have_exported(normalised, kind, sae_lens, tmp_path):
    """Un-folded weights with their scaler beside them, against the fold and inference export of SAELens."""
    from sae_lens.training.activation_scaler import ActivationScaler

    torch.manual_seed(0)
    kind, _, rescaled = kind.partition(" ")
    more = {"k": 5, "rescale_acts_by_decoder_norm": bool(rescaled)} if "TopK" in kind else {}
    more |= {"matryoshka_widths": [10, N_LATENTS]} if kind.startswith("Matryoshka") else {}
    named = {"none": "none", "scaled": "expected_average_only_in", "whitened": "covariance_whitening"}[normalised]
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")
    training = getattr(sae_lens, f"{kind}TrainingSAE")(
        config(d_in=D_IN, d_sae=N_LATENTS, normalize_activations=named, **more)
    )
    state = {name: torch.randn_like(tensor) for name, tensor in training.state_dict().items()}
    training.load_state_dict(state | {n: t.abs() + 0.5 for n, t in state.items() if "threshold" in n})
    training.save_model(tmp_path / "checkpoint")
    scaler, x = ActivationScaler(), tokens(2000)
    if normalised == "scaled":
        scaler.estimate_scaling_factor(D_IN, iter([x]), 1)
        training.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if normalised == "whitened":
        scaler.estimate_whitening(D_IN, iter([x]), 1)
    scaler.save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
    if scaler.whitening:
        w = scaler.whitening
        training.fold_activation_whitening(w.mean, w.matrix, w.inverse_matrix)
    training.save_inference_model(tmp_path / "exported")
    theirs, ours = sae_lens.SAE.load_from_disk(tmp_path / "exported"), load_sae(tmp_path / "checkpoint")
    assert ours.encode(x).l0().float().mean() > 1
    torch.testing.assert_close(ours.predict(x), theirs(x), atol=1e-4, rtol=1e-4)
