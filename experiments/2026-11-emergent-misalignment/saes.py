"""The SAE of one seed and hook point, trained on the language model before any fine-tune, and measured."""

from dataclasses import replace
from pathlib import Path

from settings import SAEs

from sae_persona.activations.lm import load_lm
from sae_persona.activations.stream import StreamConfig
from sae_persona.demo import DemoConfig
from sae_persona.features.measure import MeasureConfig
from sae_persona.lab import corpora
from sae_persona.runs import Run
from sae_persona.stages.pipeline import measure_stage
from sae_persona.stages.training import train_stage
from sae_persona.types import HookPoint


def sae_run(path: Path, model: str, hook: str, seed: int, settings: SAEs) -> None:
    demo = DemoConfig()
    lm = load_lm(model)
    streaming = StreamConfig(context_size=256, tokens="answers", passes=demo.passes, hold_tokens=500_000)
    training = replace(demo.training, seed=seed, steps=settings.steps, n_latents=settings.n_latents)
    texts = list(corpora.corpus(settings.n_corpus, seed=seed))
    rows = [row for part in corpora.SPLITS for row in corpora.labelled(settings.n_labelled, part, seed=seed)]
    with Run.making(path) as run:
        train_stage(run, lm, HookPoint.parse(hook), texts, streaming=streaming, training=training)
        measure_stage(run, lm, rows, config=MeasureConfig(context_size=256, tokens="answers"))
