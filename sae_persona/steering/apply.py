"""Apply edits while a model runs, at the right tokens: with padding on either side, with or without a cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_persona.activations.hooks import editing, watching
from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError
from sae_persona.sae.model import SAE
from sae_persona.steering.conditions import Watch, When
from sae_persona.steering.directions import check_wide
from sae_persona.steering.interventions import Edit, LatentEdit, Placed, placed
from sae_persona.steering.positions import Positions, Spans, Where
from sae_persona.steering.rows import Rows, wins
from sae_persona.types import HookPoint

SAEs = SAE | Mapping[HookPoint, SAE] | None


@dataclass(eq=False)
class Applied:
    """What goes on inside an `intervene` block."""

    aborted: Tensor | None = None
    """[b] bool, rows of the last generation that ``abort_when`` stopped."""


@dataclass(eq=False)
class _Site:
    """One hook point: its edits, which rows of the batch each is for, and the conditions that are read here."""

    rows: Rows
    requests: Tensor | None
    """[requests, edits] bool: which request asked for which edit; None: all for all."""


def _sites(
    lm: LM, saes: SAEs, requests: Sequence[Sequence[Placed]], stop: When | None
) -> tuple[dict[HookPoint, _Site], dict[tuple[int, HookPoint], Watch], dict[HookPoint, list[Watch]]]:
    """What happens at each hook point, every condition, and where each is read. Errors before anything runs."""
    by_hook: dict[HookPoint, list[tuple[int, Placed]]] = {}
    for r, edits in enumerate(requests):
        for one in edits:
            by_hook.setdefault(_hook(one, saes), []).append((r, one))
    watches: dict[tuple[int, HookPoint], Watch] = {}
    reads: dict[HookPoint, list[Watch]] = {}

    def watch(when: When, default: HookPoint | None) -> None:
        hook = when.hook or default
        if hook is None:
            raise ConfigError("a condition to stop at needs a hook point: give When(hook=...)")
        key = (id(when), hook)  # one condition may be read at several hook points
        if key not in watches:
            lm.check(hook)
            sae = _sae_at(saes, hook)
            if when.latent is not None and (sae is None or not 0 <= when.latent < sae.n_latents):
                raise ConfigError(f"the condition reads latent {when.latent} at {hook}, where no SAE has it")
            if when.direction is not None:
                check_wide(when.direction, lm.d_model)
            watches[key] = Watch(when, sae)
            reads.setdefault(hook, []).append(watches[key])

    sites = {}
    for hook, asked in by_hook.items():
        lm.check(hook)
        sae = _sae_at(saes, hook)
        if sae is not None:
            sae.check_width(lm.d_model)
        latents = [one.edit.latent for _, one in asked if isinstance(one.edit, LatentEdit)]
        if latents and sae is None and isinstance(saes, SAE):
            raise ConfigError(
                f"latent {latents[0]} is to be edited at {hook}, and the SAE reads {saes.hook}: "
                "if it is meant for there too, say so by {hook: sae}"
            )
        rows = Rows.of([one for _, one in asked], sae, lm.d_model, lm.device, requests=[r for r, _ in asked])
        for _, one in asked:
            if one.when is not None:
                _check_order(one.when, hook)
                watch(one.when, hook)
        mine = None
        if len(requests) > 1:
            mine = torch.tensor([[r == of for of, _ in asked] for r in range(len(requests))], device=lm.device)
        sites[hook] = _Site(rows, mine)
    if stop is not None:
        only = next(iter(sites)) if len(sites) == 1 else None
        watch(stop, only)
    return sites, watches, reads


def _hook(one: Placed, saes: SAEs) -> HookPoint:
    if one.hook is not None:
        return one.hook
    if isinstance(saes, SAE):
        return saes.hook
    raise ConfigError("an edit needs a hook point: give one, or the SAE of one")


def _sae_at(saes: SAEs, hook: HookPoint) -> SAE | None:
    """The SAE for that hook point; one that is given by itself serves its own only."""
    if isinstance(saes, SAE):
        return saes if saes.hook == hook else None
    return None if saes is None else saes.get(hook)


def _check_order(when: When, hook: HookPoint) -> None:
    def order(point: HookPoint) -> tuple[int, bool]:
        return point.layer, point.site == "resid_post"

    if when.hook is not None and order(when.hook) > order(hook):
        raise ConfigError(f"an edit at {hook} cannot wait for a condition at {when.hook}, which comes later: swap them")


class _Runner:
    """Edits and conditions of every hook point, through the passes of the model."""

    def __init__(self, lm: LM, saes: SAEs, requests: Sequence[Sequence[Placed]], where: Where, stop: When | None):
        self.where, self.stop, self.n_requests = where, stop, len(requests)
        self.sites, self.watches, self.reads = _sites(lm, saes, requests, stop)
        self.hooks = sorted({*self.sites, *self.reads}, key=lambda hook: (hook.layer, hook.site == "resid_post"))
        self.keeps_state = stop is not None or any(watch.when.scope == "turn" for watch in self.watches.values())

    def visit(self, hook: HookPoint, x: Tensor) -> Tensor:
        """x [b, t, d_model] as it leaves the hook point."""
        assert self.where.call is not None and self.where.prompt is not None
        for watch in self.reads.get(hook, ()):
            watch.see(x, self.where.call, self.where.prompt, cached=self.where.cached)
        site = self.sites.get(hook)
        if site is None:
            return x
        on = self._on(site, hook).to(x.device)
        if site.rows.full is None or x.shape[1] == 1:
            return site.rows.moved(x.flatten(0, 1), on.flatten(0, 1)).view_as(x)
        some = on.any(dim=-1)  # the full encoder is read only where it must be
        if not some.any():
            return x
        edited = x.clone()
        edited[some] = site.rows.moved(x[some], on[some])
        return edited

    def _on(self, site: _Site, hook: HookPoint) -> Tensor:
        """Which rows of the table act on which tokens of the pass: [b, t, m] bool."""
        edits = site.rows.edits
        by_edit = []
        for one in edits:
            chosen = self.where.chosen(one.positions)
            if one.when is not None:
                chosen = chosen & self.watches[id(one.when), one.when.hook or hook].holds
            by_edit.append(chosen)
        on = torch.stack(by_edit, dim=-1)
        if site.requests is not None:
            b = len(on)
            if b % self.n_requests:
                raise ConfigError(f"edits for {self.n_requests} rows cannot be shared out over a batch of {b}")
            on = on & site.requests.repeat_interleave(b // self.n_requests, dim=0)[:, None]
        return wins(edits, on)[..., site.rows.owner]

    def stopped(self) -> Tensor:
        """[b] bool: rows in which the condition to stop at has held."""
        assert self.stop is not None
        so_far = next(watch.so_far for (when, _), watch in self.watches.items() if when == id(self.stop))
        assert so_far is not None, "a pass has run"
        return so_far


@contextmanager
def intervene(
    lm: LM,
    sae: SAEs,
    edits: Sequence[Edit | Placed],
    *,
    hook: HookPoint | None = None,
    positions: Positions | Spans = "answer",
    prompt_lengths: Sequence[int] | None = None,
    abort_when: When | None = None,
) -> Iterator[Applied]:
    """Within the block, ``lm.model`` runs with the edits, for ``generate`` and plain forward passes.

    sae         the SAE whose latents are edited, at its own hook point; or SAEs by hook point, which may be others than
                those they were trained at; or None where only directions are edited
    hook        for edits that are not Placed; by default the hook point that the SAE was trained at
    positions   likewise
    abort_when  a generation ends for the rows in which this holds at a token of the answer or the pre-answer token;
                the token that was sampled by then stays

    In ``generate``, the prompt is what it was given. In a plain forward pass the whole input is the prompt, unless
    ``prompt_lengths`` says how many real tokens (BOS counted, padding not) each row's prompt has. All edits of a hook
    point read the stream as it comes in there, so their order does not matter; edits of one latent that meet need
    priorities. Hooks are gone, and ``generate`` is as it was, on any exit. Nests.

    ConfigError, before the model runs, for what cannot be; ModelError for a hook point that does not exist or an SAE
    of another width. `EditsMeet` warns of edits on correlated directions.
    """
    if hook is not None:
        lm.check(hook)
    requests = [placed(edits, hook=hook, positions=positions)]
    with _running(lm, sae, requests, Where(lm.bos_id, prompt_lengths), abort_when) as applied:
        yield applied


@contextmanager
def intervene_rows(
    lm: LM,
    sae: SAEs,
    requests: Sequence[Sequence[Edit | Placed]],
    *,
    hook: HookPoint | None = None,
    positions: Positions | Spans = "answer",
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[Applied]:
    """As `intervene`, with other edits for each row of the batch: requests of several users in one forward pass.

    Where ``generate`` makes several rows of one, as beams and returned sequences, they all have its edits.
    """
    each = [placed(edits, hook=hook, positions=positions) for edits in requests]
    with _running(lm, sae, each, Where(lm.bos_id, prompt_lengths), None) as applied:
        yield applied


@contextmanager
def _running(
    lm: LM, saes: SAEs, requests: Sequence[Sequence[Placed]], where: Where, stop: When | None
) -> Iterator[Applied]:
    runner, applied = _Runner(lm, saes, requests, where, stop), Applied()
    own: Callable[..., Any] = lm.model.generate  # pyright: ignore[reportAssignmentType]
    replaced = lm.model.__dict__.get("generate")  # set there by an outer block

    def generate(*args: Any, **kwargs: Any) -> Any:
        _check_generation(lm, kwargs, runner)
        where.begin()
        try:
            return own(*args, **_with_stop(kwargs, runner, applied))
        finally:
            where.end()

    with ExitStack() as stack:
        stack.enter_context(watching(lm, where.see))
        for hook in runner.hooks:
            stack.enter_context(editing(lm, hook, lambda x, hook=hook: runner.visit(hook, x)))
        lm.model.generate = generate  # pyright: ignore
        try:
            yield applied
        finally:
            if replaced is None:
                del lm.model.generate
            else:
                lm.model.generate = replaced  # pyright: ignore


def _check_generation(lm: LM, kwargs: dict[str, Any], runner: _Runner) -> None:
    """ConfigError for beams with a condition that remembers: beams are reordered, its memory is not."""
    config = kwargs.get("generation_config") or lm.model.generation_config
    beams = kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1
    if beams > 1 and runner.keeps_state:
        raise ConfigError(
            f"a condition over a turn cannot follow a search with {beams} beams: sample, or use scope token"
        )


def _with_stop(kwargs: dict[str, Any], runner: _Runner, applied: Applied) -> dict[str, Any]:
    if runner.stop is None:
        return kwargs
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            applied.aborted = runner.stopped().clone()
            return applied.aborted

    return kwargs | {"stopping_criteria": StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), Stop()])}
