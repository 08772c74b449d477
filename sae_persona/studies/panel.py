"""A frozen panel: a few latents and dense directions that are read in one model after another, in one unit.

Each measure is linear in the residual stream at the token before the answer: a latent's pre-activation, or a
projection. The score of a model is its mean over the panel's own prompts minus the base's, in standard deviations over
prompts in the base, up being the way that misaligned models went. "latents" is the mean of the latents' scores.

    NAME.json          format, what was read and on which prompts, hashes of model config and SAE, what chose it
    NAME.safetensors   weight [m, d_model], base [prompts, m]
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_persona.activations.lm import LM
from sae_persona.attribution.association import Interval
from sae_persona.attribution.baselines import logistic_probe
from sae_persona.errors import ConfigError, DataError, FormatError, ModelError
from sae_persona.runs import file_hash, read_json, versions, whole, write_json, write_whole
from sae_persona.sae.files import read_safetensors
from sae_persona.sae.model import SAE
from sae_persona.studies.dense_shift import PROBE_C, difference_component
from sae_persona.studies.readings import Prompt, Reading, check_comparable, read_prompted, together
from sae_persona.studies.shift import mean_interval
from sae_persona.types import HookPoint

FORMAT, KIND = 1, "panel"
LATENTS, MEANS = "latents", "difference of means"
DENSE = (MEANS, "PCA of the difference", "linear probe")


@dataclass(frozen=True, kw_only=True)
class PanelConfig:
    """Which latents are taken."""

    n_up: int = 1
    """Those that rose most in the bad fine-tunes, over the benign ones."""
    n_down: int = 0
    """Those that fell most."""

    def __post_init__(self) -> None:
        if min(self.n_up, self.n_down) < 0 or not self.n_up + self.n_down:
            raise ConfigError(f"a panel takes a latent or more, got n_up {self.n_up} and n_down {self.n_down}")


@dataclass(frozen=True, eq=False)
class Panel:
    """What is read, and the base's values of it.

    names    [m]: "latent 12" ..., then dense directions
    latents  of the first ones, in order; sign [m] is +1 where up is misaligned, else -1
    weight   [m, d_model] fp32; what a latent's bias adds is the same in every model, and is left out
    base     [prompts, m] fp32, of the base model; keys of the prompts in that order
    """

    hook: HookPoint
    names: tuple[str, ...]
    latents: tuple[int, ...]
    sign: tuple[int, ...]
    weight: Tensor
    base: Tensor
    keys: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    about: dict[str, Any] = field(default_factory=dict)
    """model, config_hash, vocabulary (a hash), sae (fingerprint), and the names of the fine-tunes that chose it: bad,
    benign."""

    @property
    def chosen_on(self) -> frozenset[str]:
        """Fine-tunes that the panel has seen: a score on them proves nothing."""
        return frozenset(self.about.get("bad", [])) | frozenset(self.about.get("benign", []))

    @property
    def measures(self) -> tuple[str, ...]:
        """What ``scores`` gives: the latents together, each alone, and the dense directions."""
        return ((LATENTS,) if self.latents else ()) + self.names

    @property
    def directions(self) -> dict[str, Tensor]:
        """Each measure as one signed direction [d_model], in standard deviations of the base."""
        scaled = self.weight.double() * (torch.tensor(self.sign) / self.spread)[:, None]
        found = dict(zip(self.names, scaled, strict=True))
        return ({LATENTS: scaled[: len(self.latents)].mean(0)} if self.latents else {}) | found

    @property
    def spread(self) -> Tensor:
        """Standard deviation of each measure over prompts in the base: [m] fp64."""
        return self.base.double().std(0)

    def of_reading(self, reading: Reading, *, resamples: int = 1000, seed: int = 0) -> dict[str, Interval]:
        """A model's score in each measure, with its interval over prompts. DataError for no shared prompts."""
        here, there = together([Reading("the panel", self.keys, self.base), reading])
        moved = (there.x.double() @ self.weight.double().T - here.x.double()) / self.spread
        moved = (moved * torch.tensor(self.sign)).numpy()
        columns = dict(zip(self.names, moved.T, strict=True))
        if self.latents:
            columns = {LATENTS: moved[:, : len(self.latents)].mean(1)} | columns
        return {name: mean_interval(values, resamples=resamples, seed=seed) for name, values in columns.items()}

    def score(self, lm: LM, *, batch: int = 32) -> dict[str, Interval]:
        """Read a model on the panel's prompts and score it.

        ModelError for a model of another width or depth, or weights that are not finite; DataError for activations
        that are not, or prompts that its template writes in other words.
        """
        self.check(lm)
        return self.of_reading(read_prompted(lm, self.hook, self.prompts, batch=batch))

    def check(self, lm: LM) -> None:
        """ModelError for a model of another width, or to which the same prompts are other tokens."""
        if lm.d_model != self.weight.shape[1]:
            raise ModelError(
                f"the panel reads width {self.weight.shape[1]}, {lm.name} has {lm.d_model}: use its own model"
            )
        if self.about.get("vocabulary", vocabulary_hash(lm)) != vocabulary_hash(lm):
            raise ModelError(
                f"{lm.name} has another tokenizer than the panel's model: the same prompt is not the same tokens to it"
            )

    def save(self, path: str | Path) -> Path:
        """Write ``path`` (.json) and the .safetensors beside it, each whole or not at all."""
        path = Path(path)
        if path.suffix != ".json":
            raise ConfigError(f"a panel is written to a .json file, got {path}")
        tensors = path.with_suffix(".safetensors")
        made = {"weight": self.weight.float().contiguous(), "base": self.base.float().contiguous()}
        write_whole(tensors, lambda temporary: save_file(made, temporary))
        said = {"names": self.names, "latents": self.latents, "sign": self.sign, "keys": self.keys, "about": self.about}
        rows = [prompt.to_row() for prompt in self.prompts]
        head = {"format": FORMAT, "kind": KIND, "versions": versions(), "hook": str(self.hook)}
        write_json(
            path, {**head, **said, "prompts": rows, "tensors": {"file": tensors.name, "sha256": file_hash(tensors)}}
        )
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote. FormatError if a part is missing, changed or of another format."""
        path = Path(path)
        raw = read_json(path, KIND)
        if not isinstance(raw, dict) or (raw.get("kind"), raw.get("format")) != (KIND, FORMAT):
            raise FormatError(f"{path} is not a panel of format {FORMAT}: make it with `sae-persona diff --panel`")
        with whole(path, KIND):
            file = path.with_name(raw["tensors"]["file"])
            if not file.is_file() or file_hash(file) != raw["tensors"]["sha256"]:
                raise FormatError(f"{file} is missing, or not what {path.name} was written with: copy both again")
            tensors = read_safetensors(file)
            return cls(
                HookPoint.parse(raw["hook"]),
                **{name: tuple(raw[name]) for name in ("names", "latents", "sign", "keys")},
                weight=tensors["weight"],
                base=tensors["base"],
                prompts=tuple(Prompt.from_row(row) for row in raw["prompts"]),
                about=raw["about"],
            )

    def __str__(self) -> str:
        chosen = f"{len(self.about.get('bad', []))} bad and {len(self.about.get('benign', []))} benign fine-tunes"
        return f"panel at {self.hook}: {', '.join(self.names)}; {len(self.keys)} prompts; chosen on {chosen}"


def choose_panel(
    sae: SAE,
    hook: HookPoint,
    prompts: Sequence[Prompt],
    base: Reading,
    bad: Sequence[Reading],
    benign: Sequence[Reading],
    config: PanelConfig | None = None,
    *,
    latents: Mapping[int, int] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Panel:
    """Choose latents and fit directions on fine-tunes that are known to be bad or benign.

    A latent's rise is its mean shift in the bad ones minus that in the benign ones (in the base, if there are none), in
    standard deviations over prompts in the base. Directions are fitted on the same: bad against benign, on all prompts.

    latents   take these in place of the chosen ones, each with its sign: a latent that was ranked, say

    DataError without bad fine-tunes and ``latents``, or if they do not share prompts.
    """
    config = config or PanelConfig()
    if not bad and not latents:
        raise DataError(
            "a panel is chosen on fine-tunes that are known to be bad, or given its latents: there are neither"
        )
    base, *others = together([base, *bad, *benign])
    x = base.x.double()
    tuned, calm = others[: len(bad)], [one.x.double() for one in others[len(bad) :]] or [x]
    calm_mean = torch.stack(calm).mean(0)
    picked = dict(
        latents or _rising(sae, x, torch.stack([one.x.double() for one in tuned]).mean(0) - calm_mean, config)
    )
    for latent in picked:
        if not 0 <= latent < sae.n_latents:
            raise ConfigError(f"the SAE has latents 0 to {sae.n_latents - 1}, got {latent}")
    weights = [sae.w_enc[latent].detach().cpu().double() for latent in picked]
    names, sign = [f"latent {latent}" for latent in picked], list(picked.values())
    if bad:
        fitted = _directions(torch.stack([one.x.double() for one in tuned]).mean(0), calm_mean)
        names, sign = names + list(fitted), sign + [1] * len(fitted)
        weights += [torch.from_numpy(v) for v in fitted.values()]
    weight = torch.stack(weights)
    values = x @ weight.T
    still = [name for name, sd in zip(names, values.std(0), strict=True) if not sd > 0]
    if still:
        raise DataError(f"{still[0]} is the same on every prompt in the base: give more prompts")
    seen = {"bad": [one.name for one in bad], "benign": [one.name for one in benign], "sae": sae.fingerprint}
    return Panel(
        hook, tuple(names), tuple(picked), tuple(sign), weight.float(), values.float(), base.keys, tuple(prompts),
        {**(about or {}), **seen},
    )  # fmt: skip


def _rising(sae: SAE, base: Tensor, moved: Tensor, config: PanelConfig) -> dict[int, int]:
    """The latents that moved most, with their signs: base and moved [n, d_in]."""
    w = sae.w_enc.detach().cpu().double()
    spread = (base @ w.T).std(0)
    rise = moved.mean(0) @ w.T / torch.where(spread > 0, spread, math.inf)
    if config.n_up + config.n_down > sae.n_latents:
        raise ConfigError(f"n_up + n_down is at most the SAE's {sae.n_latents} latents")
    up, down = rise.topk(config.n_up).indices.tolist(), (-rise).topk(config.n_down).indices.tolist()
    return dict.fromkeys(down, -1) | dict.fromkeys(up, 1)


def _directions(bad: Tensor, calm: Tensor) -> dict[str, np.ndarray]:
    """Dense directions from calm to bad, [n, d_in] each on the same prompts."""
    b, c = bad.numpy(), calm.numpy()
    if not (b - c).any():
        raise DataError(
            "the bad fine-tunes read as the benign ones, or the base, do: there is no direction between them"
        )
    x, y = np.concatenate([b, c]), np.arange(2 * len(b)) < len(b)
    found = [(b - c).mean(0), difference_component(b - c, c, b)[0], logistic_probe(x, y, PROBE_C)]
    return {name: v / np.linalg.norm(v) for name, v in zip(DENSE, found, strict=True)}


def made_of(base: LM, tuned: LM | None = None) -> dict[str, Any]:
    """What a panel remembers of its model."""
    if tuned is not None:
        check_comparable(base, tuned)
    return {"model": base.name, "config_hash": base.config_hash, "vocabulary": vocabulary_hash(base)}


def vocabulary_hash(lm: LM) -> str:
    """SHA-256 of a tokenizer's tokens and their ids, in hex."""
    tokens = sorted(lm.tokenizer.get_vocab().items())
    return sha256(json.dumps(tokens).encode()).hexdigest()
