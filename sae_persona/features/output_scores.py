"""Scores of what a latent does: raise it at the last token of a neutral prompt, and look at the next token."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_persona.activations.dialogues import tokenize
from sae_persona.activations.hooks import editing, model_inputs, read
from sae_persona.activations.lm import LM
from sae_persona.errors import DataError
from sae_persona.sae.model import SAE
from sae_persona.types import HookPoint

CONFIDENT = 10
"""Likeliest tokens of which the token confidence is taken."""


@dataclass(frozen=True, eq=False)
class OutputScores:
    """Of n latents, each [n] fp32.

    score               (1 - r / V) p: of the latent's promoted tokens, r is the best rank (from 0) among the V logits
                        and p the highest probability, both with the latent raised. Near 1: raising it makes one of
                        them the next token. Arad et al., 2025 (2505.20063)
    delta_confidence    C(raised) - C(unedited), C = -mean of log p over the 10 likeliest tokens: below 0 if raising the
                        latent makes the model surer of a single token than it was (2510.03659)
    """

    score: Tensor
    delta_confidence: Tensor


@torch.no_grad()
def output_scores(
    lm: LM,
    sae: SAE,
    hook: HookPoint,
    latents: Tensor,
    promoted: Tensor,
    *,
    prompt: str = "From my experience,",
    boost: float = 10.0,
    batch: int = 64,
    on_done: Callable[[int], object] | None = None,
) -> OutputScores:
    """Raise each latent alone at the last token of ``prompt``, many latents in one forward pass, one a row.

    latents    [n] int64
    promoted   [n, m] int64   token ids whose rank and probability count: the first 20 of the logit lens
    boost      what is added to the latent's activation, in units of the strongest activation at that token
    on_done    told of every batch how many latents it had

    DataError if the prompt has no token, or no latent fires at its last one.
    """
    sae.check_rebuilds()
    ids = torch.tensor([tokenize(lm, prompt).ids], device=lm.device)
    if ids.shape[1] <= len(lm.prefix):
        raise DataError(f"a prompt needs a token, got {prompt!r}")
    stream = read(lm, [hook], ids, torch.ones_like(ids))[hook][0, -1]
    strongest = max(sae.encode(stream[None].to(sae.w_enc)).acts.flatten().tolist(), default=0.0)
    if not strongest > 0:
        raise DataError(f"no latent fires at the last token of the prompt {prompt!r}: give another --prompt")
    base = _confidence(_next_log_probs(lm, ids, hook, None))
    score, delta = torch.zeros(len(latents)), torch.zeros(len(latents))
    for rows in torch.arange(len(latents)).split(batch):
        added = (boost * strongest) * sae.directions(latents[rows].to(sae.w_dec.device))
        log_probs = _next_log_probs(lm, ids.expand(len(rows), -1), hook, added)
        wanted = log_probs.gather(1, promoted[rows].to(log_probs.device))
        best = wanted.amax(1)
        rank = (log_probs > best[:, None]).sum(1)
        score[rows] = ((1 - rank / log_probs.shape[1]) * best.exp()).cpu()
        delta[rows] = (_confidence(log_probs) - base).cpu()
        if on_done:
            on_done(len(rows))
    return OutputScores(score, delta)


def _next_log_probs(lm: LM, ids: Tensor, hook: HookPoint, added: Tensor | None) -> Tensor:
    """[b, V] fp32 after the last token, with ``added`` [b, d_model] put into the stream there."""

    def edit(x: Tensor) -> Tensor:
        if added is None:
            return x
        x = x.clone()
        x[:, -1] += added.to(x)
        return x

    inputs = model_inputs(lm, ids, torch.ones_like(ids))
    if "logits_to_keep" in inspect.signature(lm.model.forward).parameters:
        inputs["logits_to_keep"] = 1
    with editing(lm, hook, edit):
        return lm.model(**inputs).logits[:, -1].float().log_softmax(-1)


def _confidence(log_probs: Tensor) -> Tensor:
    return -log_probs.topk(min(CONFIDENT, log_probs.shape[1])).values.mean(1)
