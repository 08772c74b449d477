"""A run folder made by hand: one persona with everything, whose name and answers hold markup."""

import math
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from sae_persona.activations.lm import LM, load_lm
from sae_persona.attribution.association import Interval
from sae_persona.attribution.baselines import DenseBaseline, RandomLatents
from sae_persona.attribution.ranking import RankedLatent, Ranking
from sae_persona.features.contexts import TopContexts
from sae_persona.features.files import write_h5
from sae_persona.features.firings import Firings, Piece, TokenRows
from sae_persona.features.stats import LatentStats
from sae_persona.runs import Run, write_json, write_text
from sae_persona.steering.arms import Arm, Sweep
from sae_persona.steering.divergence import EditReading, Readings
from sae_persona.steering.sweep import SweepConfig
from sae_persona.types import SparseLatents

PERSONA = "pirate & <i>co"
ATTACK = "<script>alert('arr')</script>"
N_LATENTS, CHOSEN = 16, 3
EDIT = EditReading(operation="clamp", latent=CHOSEN, strength=1.0, value=4.0, before=0.5, realised=3.25)
READINGS = Readings(kl_mean=0.4, kl_tail=1.5, ratio_mean=0.3, ratio_p95=0.6, n_tokens=640, edits=(EDIT,))


@pytest.fixture(scope="session")
def lm() -> LM:
    return load_lm("lab")


@pytest.fixture(scope="session")
def interval() -> Callable[[float], Interval]:
    return lambda value, half=0.05: Interval(value, value - half, value + half)


@pytest.fixture(scope="session")
def ranking(interval) -> Ranking:
    def row(latent: int, z: float, p: float) -> RankedLatent:
        auroc, unknown = interval(0.5 + z / 40, 0.03), Interval(math.nan, math.nan, math.nan)
        return RankedLatent(
            latent=latent, z=z, p_max_t=p, q_bh=p / 3, auroc=auroc, r=unknown, difference=unknown, d=unknown,
            held_out_z=z, held_out_auroc=auroc, held_out_p=p, firing_rate=0.1, p999=4.0,
        )  # fmt: skip

    rows = [row(CHOSEN, 15.0, 1 / 200), row(7, -6.0, 1 / 200), row(5, 2.0, 0.3), row(6, 1.0, 0.9)]
    return Ranking(
        persona=PERSONA,
        config={"pool": "pre", "within": ["template"], "permutations": 199},
        n_train=(40, 60),
        n_held_out=(30, 50),
        n_blocks=4,
        n_tested=12,
        rows=tuple(rows),
        dense=(DenseBaseline("difference of means", interval(0.99, 0.01), interval(0.98, 0.01), 0.005),),
        random=RandomLatents(5, 0.51, 0.57),
    )


@pytest.fixture(scope="session")
def make_sweep(interval) -> Callable[..., Sweep]:
    def arm(kind: str, rate: float, cost: float, strength: float | None = None, *, part: str = "test") -> Arm:
        side = {"toxic": 0.12, "evasive": math.nan} if kind != "baseline" else {"toxic": 0.0}
        return Arm(
            n_questions=40,
            kind=kind, part=part, strength=strength,
            latent={"latent": CHOSEN, "random": 9, "wrong sign": CHOSEN}.get(kind),
            readings=None if kind == "baseline" else READINGS,
            rate=interval(rate), gain=interval(rate - 0.1), cost=interval(cost, 0.02), perplexity=2.0 * cost,
            valid=interval(0.8), side_effects=side, n=60,
            examples=(("who are you ?", ATTACK if kind == "latent" else "a quiet sailor"),),
        )  # fmt: skip

    def make(dense: float = 0.7) -> Sweep:
        latent = [(0.5, 0.3, 1.05), (1.0, 0.6, 1.2), (2.0, 0.9, 40.0)]
        return Sweep(
            persona=PERSONA,
            latent=CHOSEN,
            unit=4.0,
            strength=1.0,
            positions="answer",
            config=asdict(SweepConfig()),
            arms=(
                arm("baseline", 0.1, 1.0, part="development"),
                *(arm("latent", rate, cost, s, part="development") for s, rate, cost in latent),
                arm("baseline", 0.1, 1.0),
                *(arm("latent", rate, cost, s) for s, rate, cost in latent),
                arm("wrong sign", 0.05, 1.3, -1.0),
                arm("random", 0.12, 1.1, 1.0),
                arm("difference of means", dense, 1.2, 0.8),
                arm("prompt", 0.8, 1.1),
            ),
        )

    return make


@pytest.fixture
def trained(tmp_path, lm) -> Run:
    """A run with the train stage only, as far as the report reads it."""
    run = Run.create(tmp_path / "run")
    model = {"name": lm.name, "config_hash": lm.config_hash, "blocks": lm.blocks_path}
    training = {"rule": "batch_topk", "n_latents": N_LATENTS, "k": 2}
    with run.recording("train", model=model, hook="layers.1.resid_post", training=training):
        steps = [
            f'{{"tokens": {1000 * i}, "loss": {9 / i}, "fvu": {0.9 / i}, "l0": 2.0, "dead": 0.0}}' for i in range(1, 9)
        ]
        write_text(run.metrics, "\n".join(steps))
    return run


@pytest.fixture
def full(trained, lm, ranking, make_sweep) -> Run:
    """A run with everything."""
    names = ("fvu", "l0", "dead", "ce", "ce_spliced", "ce_zero", "ce_mean", "kl_spliced", "kl_zero", "kl_mean")
    write_json(trained.quality, {"n_tokens": 800, "ce_recovered": None, **dict.fromkeys(names, 0.25)})
    ids = lm.tokenizer("i need a good food for bees .")["input_ids"]
    rows = TokenRows.of([Piece(0, 0, ids, torch.ones(len(ids), dtype=torch.bool))])
    ends = torch.arange(-3, len(ids) - 2).clamp(0, 2)  # tokens 3 and 4 have an entry each
    latents = SparseLatents(torch.tensor([2.5, 0.5]), torch.tensor([CHOSEN, CHOSEN]), ends)
    contexts = TopContexts(N_LATENTS)
    contexts.update(Firings.of(rows, latents, N_LATENTS))
    stats = LatentStats(N_LATENTS)
    stats.n_tokens, stats.fired[0] = 1000, 20

    def fill(file):
        stats.to_h5(file.create_group("stats"))
        contexts.to_h5(file.create_group("contexts"))

    write_h5(trained.latents, "latents", fill)
    with trained.recording("measure", examples=180, tokens=1234):
        pass
    with trained.recording("rank", persona=PERSONA):
        ranking.save(trained.ranking(PERSONA))
    make_sweep().save(trained.sweep(PERSONA))
    return trained
