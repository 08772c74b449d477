"""The stage that describes a run's latents: which, by whom, and what of it is there already."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError
from sae_persona.features.answer_log import AnswerLog
from sae_persona.features.describe import DescribeConfig, check_latents, describe, silent_texts
from sae_persona.features.descriptions import Description, Descriptions
from sae_persona.features.explain import ExplainConfig, Plan, Subject, explain, plan
from sae_persona.features.explainers import Explainer
from sae_persona.features.measure import Measurement
from sae_persona.runs import Run
from sae_persona.stages.pipeline import open_ranking
from sae_persona.stages.training import open_sae

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Described:
    """What a stage has described, and how the explaining went; all 0 where nobody was asked."""

    descriptions: list[Description]
    explained: int = 0
    """Latents with an explanation, with or without scores."""
    failed: int = 0
    """Latents with an error: no explanation, or a score of it missing."""
    requests: int = 0
    """That went out; the others were answered from the log."""


def choose_latents(
    run: Run, found: Measurement, latents: Sequence[int], *, top: int | None = None, persona: str | None = None
) -> list[int]:
    """The given latents, or the ``top`` of a persona's ranking, or those that fire most often; by default all.

    ConfigError if latents are given together with a choice, DataError for one that does not exist, RunError if the
    persona was not ranked.
    """
    n_latents = found.stats.n_latents
    if latents:
        if top is not None or persona is not None:
            raise ConfigError("give latents by number, or --top and --persona: not both")
        check_latents(latents, n_latents)
        return list(dict.fromkeys(latents))
    if top is not None and top < 1:
        raise ConfigError(f"top is at least 1, got {top}")
    if persona is not None:
        return [row.latent for row in open_ranking(run, persona)[:top]]
    if top is not None:
        order = torch.argsort(found.stats.fired, descending=True, stable=True)
        return order[:top].tolist()
    return list(range(n_latents))


def describe_stage(
    run: Run,
    lm: LM,
    latents: Sequence[int],
    *,
    config: DescribeConfig | None = None,
    explainer: Explainer | None = None,
    explaining: ExplainConfig | None = None,
    found: Measurement | None = None,
    on_described: Progress | None = None,
    on_explained: Callable[[Description], object] | None = None,
) -> Described:
    """Describe latents, and have them explained where an explainer is given; the rest of ``descriptions.jsonl`` stays.

    Without an explainer, explanations that are there stay, too. Every answer is in ``explanations.jsonl`` at once, so
    that a run which is killed asks only what it has not been told.
    """
    config, explaining = config or DescribeConfig(), explaining or ExplainConfig()
    run.stage("measure")
    found = found or Measurement.load(run)
    log = AnswerLog(run.explanations)
    facts = {"config": asdict(config), "explainer": explainer.name if explainer else None}
    if explainer:
        facts["explaining"] = asdict(explaining)
    with run.recording("describe", latents=len(latents), **facts) as entry:
        sae = open_sae(run, lm)
        new = describe(lm, sae.hook, sae, found.contexts, latents, config, on_done=on_described)
        old = _earlier(run, sae.fingerprint, config)
        if explainer:
            silent = silent_texts(lm, sae.hook, sae, found, seed=explaining.seed) if explaining.scores else None
            subjects = [Subject(each, found.contexts.of(each.latent)) for each in new]
            new = explain(explainer, lm.tokenizer, subjects, silent, log, explaining, on_done=on_explained)
        else:
            new = [_with_explanation(each, old.get(each.latent)) for each in new]
        old.with_new(new).save(run)
        asked = new if explainer else []
        explained, failed = sum(each.explanation is not None for each in asked), sum(bool(each.error) for each in asked)
        entry |= {"explained": explained, "failed": failed, "requests": log.asked}
    return Described(new, explained, failed, log.asked)


def plan_stage(
    run: Run,
    lm: LM,
    latents: Sequence[int],
    explainer_name: str,
    *,
    config: DescribeConfig | None = None,
    explaining: ExplainConfig | None = None,
    answer_tokens: int,
    found: Measurement | None = None,
) -> Plan:
    """What `describe_stage` would ask that explainer. Nothing is written."""
    config, explaining = config or DescribeConfig(), explaining or ExplainConfig()
    found, sae = found or Measurement.load(run), open_sae(run, lm)
    silent = silent_texts(lm, sae.hook, sae, found, seed=explaining.seed) if explaining.scores else None
    described = describe(lm, sae.hook, sae, found.contexts, latents, replace(config, outputs=False))
    subjects = [Subject(each, found.contexts.of(each.latent)) for each in described]
    log = AnswerLog(run.explanations)
    return plan(explainer_name, lm.tokenizer, subjects, silent, log, explaining, answer_tokens=answer_tokens)


def _earlier(run: Run, sae: str, config: DescribeConfig) -> Descriptions:
    """The descriptions that are there, if they are of the same SAE and in the same numbers."""
    if run.descriptions.is_file():
        old = Descriptions.load(run)
        if (old.sae, old.z_scored) == (sae, config.z_scored):
            return old
    return Descriptions(sae, {}, config.z_scored)


def _with_explanation(new: Description, old: Description | None) -> Description:
    if old is None:
        return new
    names = ("explanation", "detection", "fuzzing", "explainer", "error")
    return replace(new, **{name: getattr(old, name) for name in names})
