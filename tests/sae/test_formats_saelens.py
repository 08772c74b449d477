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
