"""An intervention as a value: edits with their places, what of each SAE they need, and what they were made for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, ModelError
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Threshold, TopK
from sae_persona.steering.apply import Applied, SAEs, intervene
from sae_persona.steering.conditions import When
from sae_persona.steering.interventions import Edit, LatentEdit, Placed, placed
from sae_persona.steering.positions import Positions, Spans
from sae_persona.steering.rows import Rows
from sae_persona.types import HookPoint


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """The model of an intervention; what is None its file does not say."""

    name: str
    d_model: int
    n_layers: int | None = None
    config_hash: str | None = None
    blocks: str | None = None
    """Module path of its list of blocks."""
    bos_id: int | None = None

    @classmethod
    def of(cls, lm: LM) -> Self:
        return cls(
            name=lm.name,
            d_model=lm.d_model,
            n_layers=lm.n_layers,
            config_hash=lm.config_hash,
            blocks=lm.blocks_path,
            bos_id=lm.bos_id,
        )

    def check(self, lm: LM) -> None:
        """ModelError unless ``lm`` is that model, as far as is known."""
        if self.d_model != lm.d_model:
            raise ModelError(
                f"the intervention is for width {self.d_model}, {lm.name} has {lm.d_model}: load its model"
            )
        if self.config_hash is not None and self.config_hash != lm.config_hash:
            raise ModelError(
                f"the intervention was made for {self.name} of config {self.config_hash[:8]}, and {lm.name} here has "
                f"config {lm.config_hash[:8]}: load that model, or export the edits for this one"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """An SAE, or as much of it as an intervention needs."""

    rule: str
    n_latents: int
    """Of the whole SAE."""
    fingerprint: str
    sae: SAE | None
    """None: it must be given, for its rule reads all latents and the file has none."""
    latents: tuple[int, ...] | None = None
    """The latents that the rows of ``sae`` are; None: it is whole."""

    @classmethod
    def whole(cls, sae: SAE) -> Self:
        return cls(rule=type(sae.rule).__name__, n_latents=sae.n_latents, fingerprint=sae.fingerprint, sae=sae)

    def rows(self, latents: Sequence[int]) -> dict[str, torch.Tensor]:
        """w_enc, w_dec [m, d_in], b_enc [m] and, with thresholds, threshold [m], of these latents; on the CPU."""
        sae = self.needed()
        at = list(latents) if self.latents is None else [self.latents.index(latent) for latent in latents]
        weights = {"w_enc": sae.w_enc, "b_enc": sae.b_enc, "w_dec": sae.w_dec}
        if isinstance(sae.rule, Threshold):
            weights["threshold"] = sae.rule.threshold  # pyright: ignore[reportArgumentType]
        return {name: weight.detach()[at].float().cpu().contiguous() for name, weight in weights.items()}

    def needed(self) -> SAE:
        """The SAE. ModelError if it is not there."""
        if self.sae is None:
            raise ModelError(
                f"the intervention edits a {self.rule} SAE, whose latents depend on each other: pass the SAE too"
            )
        return self.sae


def part_of_rows(tensors: Mapping[str, torch.Tensor], hook: HookPoint) -> SAE:
    """An SAE of some rows, as `Part.rows` gave them: enough for edits under a rule with a threshold."""
    rule = Threshold(tensors["threshold"]) if "threshold" in tensors else ReLU()
    b_dec = torch.zeros(tensors["w_dec"].shape[1])  # not read: an edit never decodes
    return SAE(tensors["w_enc"], tensors["b_enc"], tensors["w_dec"], b_dec, rule, {"hook": str(hook)})


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """Edits that can be applied to the model they were made for, and written to a file."""

    edits: tuple[Placed, ...]
    """Each with its hook point. Latents are numbered as in the SAE that they come from."""
    parts: Mapping[HookPoint, Part]
    """Of the SAEs whose latents are edited or waited for."""
    model: MadeFor
    evidence: Mapping[str, Any] = field(default_factory=dict)
    approximation: Mapping[str, Any] | None = None
    """Where edits stand in for others: what is lost, as `approximate` measured it."""

    @classmethod
    def of(
        cls,
        lm: LM,
        saes: SAEs,
        edits: Sequence[Edit | Placed],
        *,
        hook: HookPoint | None = None,
        positions: Positions | Spans = "answer",
        evidence: Mapping[str, Any] | None = None,
    ) -> Self:
        """As `intervene` takes them, and with its errors: ConfigError, ModelError; ConfigError without edits."""
        if not edits:
            raise ConfigError("an intervention needs at least one edit, got none")
        with intervene(lm, saes, edits, hook=hook, positions=positions):
            pass  # it refuses what cannot be applied
        whole = _resolved(placed(edits, hook=hook, positions=positions), saes)
        at = {one.hook for one in whole if isinstance(one.edit, LatentEdit)}
        at |= {one.when.hook for one in whole if one.when is not None and one.when.latent is not None}
        known: dict[int, Part] = {}
        parts = {}
        for point in sorted(point for point in at if point is not None):
            sae = saes if isinstance(saes, SAE) else (saes or {})[point]
            parts[point] = known.setdefault(id(sae), Part.whole(sae))
        return cls(edits=tuple(whole), parts=parts, model=MadeFor.of(lm), evidence=dict(evidence or {}))

    @contextmanager
    def applied(self, lm: LM, *, prompt_lengths: Sequence[int] | None = None) -> Iterator[Applied]:
        """Within the block, ``lm`` runs with the edits, as `intervene` has it.

        ModelError if it is another model, or the SAE of a rule that reads all latents is not there.
        """
        self.model.check(lm)
        edits, saes = self.ready()
        saes = {hook: sae.to(lm.device) for hook, sae in saes.items()}
        with intervene(lm, saes, edits, prompt_lengths=prompt_lengths) as applied:
            yield applied

    def ready(self) -> tuple[list[Placed], dict[HookPoint, SAE]]:
        """Edits and SAEs for `intervene`: where an SAE is in rows, latents are numbered by them."""
        renamed: dict[int, When] = {}
        edits = []
        for one in self.edits:
            edit, when = one.edit, one.when
            if isinstance(edit, LatentEdit):
                edit = replace(edit, latent=self._row(one.hook, edit.latent))
            if when is not None and when.latent is not None:
                new = replace(when, latent=self._row(when.hook, when.latent))
                when = renamed.setdefault(id(when), new)  # edits that share a condition still do
            edits.append(replace(one, edit=edit, when=when))
        return edits, {hook: part.needed() for hook, part in self.parts.items()}

    def _row(self, hook: HookPoint | None, latent: int) -> int:
        assert hook is not None
        part = self.parts[hook]
        return latent if part.latents is None else part.latents.index(latent)

    @property
    def hooks(self) -> list[HookPoint]:
        """Where it edits, in the order in which a forward pass meets them."""
        points = {one.hook for one in self.edits if one.hook is not None}
        return sorted(points, key=lambda hook: (hook.layer, hook.site == "resid_post"))

    def rows(self, hook: HookPoint, device: torch.device | str = "cpu") -> Rows:
        """The edits of one hook point as a table."""
        edits, saes = self.ready()
        return Rows.of([one for one in edits if one.hook == hook], saes.get(hook), self.model.d_model, device)

    @property
    def latents(self) -> tuple[int, ...]:
        """The latents that are edited, in order."""
        return tuple(one.edit.latent for one in self.edits if isinstance(one.edit, LatentEdit))


def needs_all(part: Part) -> bool:
    """Whether its rule reads all latents."""
    return part.rule == TopK.__name__


def _resolved(edits: Sequence[Placed], saes: SAEs) -> list[Placed]:
    """With every hook point named, those of conditions too, as `intervene` finds them."""
    default = saes.hook if isinstance(saes, SAE) and any(one.hook is None for one in edits) else None
    whole = [one if one.hook else replace(one, hook=default) for one in edits]
    renamed: dict[tuple[int, HookPoint | None], When] = {}  # one condition may be read at several hook points
    resolved = []
    for one in whole:
        if one.when is not None:
            at = one.when.hook or one.hook
            one = replace(one, when=renamed.setdefault((id(one.when), at), replace(one.when, hook=at)))
        resolved.append(one)
    return resolved
