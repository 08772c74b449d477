"""The lab's model with a small random SAE, contrast pairs, and a ranking over that SAE's latents."""

import pytest
import torch

from sae_persona.activations.lm import LM, load_lm
from sae_persona.attribution.association import Interval
from sae_persona.attribution.baselines import RandomLatents
from sae_persona.attribution.contrasts import Contrast, read_contrasts
from sae_persona.attribution.ranking import RankedLatent, Ranking
from sae_persona.lab.contrasts import contrasts
from sae_persona.sae.formats import hook_metadata
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import Threshold
from sae_persona.types import HookPoint

HOOK = HookPoint(2)
N_LATENTS = 60


@pytest.fixture(scope="session")
def lm() -> LM:
    return load_lm("lab")


@pytest.fixture(scope="session")
def sae(lm) -> SAE:
    """Latents that fire on about a third of the tokens."""
    g = torch.Generator().manual_seed(0)
    w_enc = torch.randn(N_LATENTS, lm.d_model, generator=g)
    w_dec = torch.nn.functional.normalize(torch.randn(N_LATENTS, lm.d_model, generator=g), dim=1)
    rule = Threshold(torch.full((N_LATENTS,), 0.5))
    return SAE(w_enc, torch.zeros(N_LATENTS), w_dec, torch.zeros(lm.d_model), rule, hook_metadata(lm, HOOK))


@pytest.fixture(scope="session")
def pairs() -> list[Contrast]:
    return read_contrasts([row for part in ("train", "held_out") for row in contrasts("formal", 6, part)])


@pytest.fixture(scope="session")
def make_ranking():
    """A ranking of the latents given, best first; negative z for those that fall with the persona."""

    def make(latents, *, z=9.0, p=0.001, pool="pre") -> Ranking:
        interval = Interval(0.9, 0.8, 0.95)
        rows = tuple(
            RankedLatent(
                latent=latent,
                z=(z if not isinstance(z, dict) else z[latent]) - 0.01 * place,
                p_max_t=p,
                q_bh=p,
                auroc=interval,
                r=interval,
                difference=interval,
                d=interval,
                held_out_z=4.0,
                held_out_auroc=interval,
                held_out_p=p,
                firing_rate=0.1,
                p999=2.0,
            )
            for place, latent in enumerate(latents)
        )
        return Ranking(
            persona="formal",
            config={"pool": pool, "within": [], "permutations": 10},
            n_train=(5, 5),
            n_held_out=(5, 5),
            n_blocks=1,
            n_tested=N_LATENTS,
            rows=rows,
            dense=(),
            random=RandomLatents(0, float("nan"), float("nan")),
        )

    return make
