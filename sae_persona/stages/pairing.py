"""Match the dictionaries of two runs or SAE folders, with activations on texts that both read."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sae_persona.activations.dialogues import tokenize
from sae_persona.activations.harvest import harvest
from sae_persona.activations.lm import LM, load_lm
from sae_persona.activations.sequences import kept
from sae_persona.activations.texts import read_texts
from sae_persona.errors import ConfigError, FormatError, ModelError
from sae_persona.features.matching import MatchConfig, Matching, match
from sae_persona.features.measure import MeasureConfig
from sae_persona.runs import Run
from sae_persona.sae.formats import load_sae
from sae_persona.sae.model import SAE
from sae_persona.stages.training import Source, open_model
from sae_persona.types import HookPoint


def match_stage(
    first: str | Path,
    second: str | Path,
    *,
    texts: Source | None = None,
    reading: MeasureConfig | None = None,
    config: MatchConfig | None = None,
    device: str = "cpu",
) -> Matching:
    """Match the dictionaries of two runs or SAE folders; with ``texts``, their activations too.

    ModelError for SAEs of other models or hook points where texts are given, of other widths always.
    """
    saes = [open_dictionary_of(folder) for folder in (first, second)]
    if texts is None:
        return match(*(sae.to(device) for sae in saes), config=config)
    hook = _same_place(saes)
    run = next((Path(folder) for folder in (first, second) if _is_run(folder)), None)
    lm = open_model(Run.open(run), device=device) if run else load_lm(saes[0].metadata["model"], device=device)
    for sae in saes:
        sae.check_width(lm.d_model)
    batches = activations(lm, hook, texts, reading or MeasureConfig())
    return match(*(sae.to(lm.device) for sae in saes), acts=batches, config=config)


def open_dictionary_of(folder: str | Path) -> SAE:
    """The SAE of a run folder or of an SAE folder. RunError or FormatError if it is neither."""
    return load_sae(Run.open(folder).sae if _is_run(folder) else folder)


def activations(lm: LM, hook: HookPoint, texts: Source, config: MeasureConfig) -> Iterator[Tensor]:
    """Activations on the counted tokens of texts, some texts at a time: [n, d_model] fp32. Errors as ``measure``."""
    lm.check(hook)
    if lm.n_positions is not None and config.context_size > lm.n_positions:
        raise ConfigError(f"context_size {config.context_size} is more than {lm.name} takes: {lm.n_positions}")
    tokens = (tokenize(lm, source, context_size=config.context_size) for source in read_texts(texts))
    waiting: list[Tensor] = []
    for found, x in harvest(lm, hook, (one for one in tokens if one.ids), config.lm_batch):
        waiting.append(x[kept(lm, found, config.tokens).to(x.device)])
        if len(waiting) == config.lm_batch:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def _is_run(folder: str | Path) -> bool:
    return (Path(folder) / "manifest.json").is_file()


def _same_place(saes: list[SAE]) -> HookPoint:
    """The hook point that both read. ModelError for two places, FormatError if one does not say."""
    for name in ("model", "hook"):
        told = [sae.metadata.get(name) for sae in saes]
        if None in told:
            raise FormatError(f"an SAE does not say which {name} it reads: set metadata.{name} in its cfg.json")
        if told[0] != told[1]:
            raise ModelError(f"the SAEs read {told[0]} and {told[1]}: activations can be compared at one {name} only")
    return saes[0].hook
