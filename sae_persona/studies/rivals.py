"""What an edit of latents has to beat: random latents and directions that move the stream as far, the wrong sign, and
the difference of means between tuned and base, projected out or added at a strength that is chosen as the latents' is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.hooks import read
from sae_persona.activations.lm import LM, padded
from sae_persona.features.stats import LatentStats
from sae_persona.sae.model import SAE
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.apply import intervene
from sae_persona.steering.controls import matched_latents
from sae_persona.steering.interventions import Clamp, Placed, ProjectOut, Steer
from sae_persona.steering.rows import Rows
from sae_persona.studies.candidates import MeasuredSAE
from sae_persona.studies.development import Development, Try
from sae_persona.studies.minimal_set import Member, SearchConfig, order
from sae_persona.types import HookPoint

Batches = list[tuple[Tensor, Tensor, list[int]]]
"""Token ids and their mask [b, t], and the length of each prompt."""


def answered_batches(lm: LM, prompts: Sequence[list[int]], config: AnswerConfig) -> Batches:
    """The prompts with what the model answers to them, as it runs just now."""
    written = answer(lm, prompts, config)
    made = []
    for at in range(0, len(prompts), config.batch):
        rows = range(at, min(at + config.batch, len(prompts)))
        ids, mask = padded(lm, [prompts[i] + written[i].ids for i in rows], side="right")
        made.append((ids, mask, [len(prompts[i]) for i in rows]))
    return made


def _at_answers(mask: Tensor, lengths: Sequence[int]) -> Tensor:
    """Tokens from the one before the answer on: [b, t] bool."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return mask.bool() & (place >= torch.tensor(lengths, device=mask.device)[:, None] - 1)


@torch.no_grad()
def own_stats(lm: LM, sae: SAE, chats: Sequence[Sequence[Mapping]], config: AnswerConfig) -> LatentStats:
    """How strongly latents fire on a model's own answers, for an SAE that was measured on no corpus."""
    stats = LatentStats(sae.n_latents)
    for ids, mask, lengths in answered_batches(lm, [prompt_tokens(lm, chat) for chat in chats], config):
        x = read(lm, [sae.hook], ids, mask)[sae.hook].float()
        stats.update(sae.encode(x[_at_answers(mask, lengths)]))
    return stats


@torch.no_grad()
def moves(
    lm: LM,
    saes: Mapping[HookPoint, SAE],
    edits: Sequence[Placed],
    chats: Sequence[Sequence[Mapping]],
    config: AnswerConfig,
) -> list[float]:
    """How far each edit moves the residual stream, in its units: mean over the tokens of answers under all of them.

    An edit reads the stream that edits at earlier hook points have left.
    """
    with intervene(lm, saes, edits):
        batches = answered_batches(lm, [prompt_tokens(lm, chat) for chat in chats], config)
    found = {}
    for hook in {one.hook for one in edits if one.hook is not None}:
        mine = [i for i, one in enumerate(edits) if one.hook == hook]
        earlier = [one for one in edits if one.hook is not None and one.hook < hook]
        rows = Rows.of([edits[i] for i in mine], saes.get(hook), lm.d_model, lm.device)
        parts = []
        for ids, mask, lengths in batches:
            with intervene(lm, saes, earlier, prompt_lengths=lengths):
                x = read(lm, [hook], ids, mask)[hook].float()
            x = x[_at_answers(mask, lengths)]
            on = torch.ones(len(x), len(rows.owner), dtype=torch.bool, device=x.device)
            parts.append(rows.deltas(x, on).abs() * rows.dec.norm(dim=1))
        size = torch.cat(parts).double().mean(0)
        for place, i in enumerate(mine):
            found[i] = float(size[rows.owner == place].sum())
    return [found[i] for i in range(len(edits))]


def random_latents(
    sites: Mapping[HookPoint, MeasuredSAE],
    members: Sequence[Member],
    distances: Sequence[float],
    n: int,
    config: SearchConfig,
    *,
    seed: int = 0,
) -> list[list[Placed]]:
    """``n`` sets of random latents: each stands for a member that fires about as often on the measured corpus, and is
    clamped to the same side, as far as the member's edit moves the stream. Fewer, if there are not so many latents.
    """
    taken = {hook: [one.latent for one, _ in members if one.hook == hook] for hook in sites}
    columns = []
    for (candidate, _), distance in zip(members, distances, strict=True):
        site = sites[candidate.hook]
        assert site.stats is not None, "the caller has measured"
        rates = np.maximum(site.stats.firing_rate.cpu().numpy(), 1e-9 / max(site.stats.n_tokens, 1))
        picked = matched_latents(rates, taken[candidate.hook], candidate.latent, n, seed=seed)
        taken[candidate.hook] += picked
        norms = (
            site.sae.directions(torch.tensor(picked, dtype=torch.int64, device=site.sae.w_dec.device))
            .norm(dim=1)
            .tolist()
        )
        side = 1.0 if candidate.rise < 0 else -1.0
        columns.append(
            [
                Placed(edit=Clamp(i, side, distance / norm), hook=candidate.hook, positions=config.positions)
                for i, norm in zip(picked, norms, strict=True)
            ]
        )
    return [list(row) for row in zip(*columns, strict=False)]


def random_directions(
    members: Sequence[Member], distances: Sequence[float], d_model: int, n: int, config: SearchConfig, *, seed: int = 0
) -> list[list[Placed]]:
    """``n`` sets of random directions, each added as far as the member's edit that it stands for moves the stream."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        drawn = torch.nn.functional.normalize(torch.randn(len(members), d_model, generator=generator), dim=1)
        made.append(
            [
                Placed(edit=Steer(direction, distance), hook=candidate.hook, positions=config.positions)
                for direction, distance, (candidate, _) in zip(drawn, distances, members, strict=True)
                if distance > 0
            ]
        )
    return made


def wrong_sign(members: Sequence[Member], config: SearchConfig) -> list[Placed]:
    """The members clamped to the other side, as far; by one unit where the edit has no strength."""
    return [candidate.edit("clamp", -(strength or 1.0), config.positions) for candidate, strength in members]


def dense_rivals(
    dev: Development, direction: Mapping[HookPoint, Tensor], config: SearchConfig
) -> dict[str, tuple[list[Placed], Try, int]]:
    """The difference of means, projected out and subtracted: the best edits of each kind, what they did on the
    development questions, and the tries that they took. Tried at each hook point, and at all; subtracted at every
    strength that clamps are tried at, and half and one and a half times that.
    """
    hooks = sorted(direction)
    places = [[hook] for hook in hooks] + ([hooks] if len(hooks) > 1 else [])
    strengths = sorted({s * factor for s in config.strengths for factor in (0.5, 1.0, 1.5)})
    tried: dict[str, list[tuple[tuple[float, ...], list[Placed], Try]]] = {"projected out": [], "subtracted": []}
    for place in places:
        ways = [("projected out", 0.0, [ProjectOut(direction[hook]) for hook in place])]
        ways += [("subtracted", s, [Steer(direction[hook], -s) for hook in place]) for s in strengths]
        for name, strength, edits in ways:
            at = [
                Placed(edit=edit, hook=hook, positions=config.positions)
                for edit, hook in zip(edits, place, strict=True)
            ]
            found = dev.of(at)
            tried[name].append((order(found, strength * len(place), config), at, found))
    best = {name: min(rows, key=lambda row: row[0]) for name, rows in tried.items()}
    return {name: (edits, found, len(tried[name])) for name, (_, edits, found) in best.items()}


def everywhere(edits: Sequence[Placed]) -> list[Placed]:
    """The same at every token, as on texts that have no answers."""
    return [replace(one, positions="all") for one in edits]
