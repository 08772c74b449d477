"""Training through the kernels and in plain torch, on the lab's activations: one SAE within rounding."""

import pytest
import torch

from sae_persona.activations.lm import load_lm
from sae_persona.activations.stream import StreamConfig, stream
from sae_persona.attribution.rank import RankConfig, rank
from sae_persona.features.measure import MeasureConfig, measure
from sae_persona.lab import corpora
from sae_persona.sae.kernel_plan import KernelConfig
from sae_persona.sae.recipe import TrainConfig
from sae_persona.sae.train import train
from sae_persona.types import HookPoint

HOOK, TRAITS = HookPoint(3), ("formal", "cheerful", "sarcastic")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["topk", "batch_topk"])
def test_the_kernels_train_the_sae_that_plain_torch_trains(rule):
    lm = load_lm("lab", device="cuda")
    streaming = StreamConfig(context_size=256, tokens="answers", passes=2, batch_tokens=1024)
    batches = list(stream(lm, HOOK, list(corpora.corpus(900)), streaming))
    rows = [*corpora.labelled(600, "train"), *corpora.labelled(400, "held_out")]
    config = TrainConfig(n_latents=512, k=8, lr=2e-3, steps=200, rule=rule, log_every=10)
    losses, aurocs = [], []
    for kernels in (None, KernelConfig()):
        lines = []
        sae = train(batches, config, kernels=kernels, on_step=lines.append, progress=False)
        losses.append(torch.tensor([line["loss"] for line in lines]))
        found = measure(lm, HOOK, sae, rows, MeasureConfig(context_size=256, tokens="answers"))
        rankings = [rank(found.pooled, found.stats, trait, RankConfig()) for trait in TRAITS]
        aurocs.append([ranking[0].held_out_auroc.value for ranking in rankings])
    assert (losses[0] / losses[1] - 1).abs()[-1] < 0.01, losses
    # where the loss falls fastest, half a step apart is more
    assert (losses[0] / losses[1] - 1).abs().max() < 0.03, losses
    assert aurocs[0] == pytest.approx(aurocs[1], abs=0.01)
