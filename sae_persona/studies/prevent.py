"""Keep what bad rows teach in their domain from spreading: a fine-tune with and without guards, side by side.

base      the model as it is
plain     tuned on the rows
steer     tuned while the panel's latents, its difference of means, or random latents are added to the stream, which
          they are not any more when the model is examined
penalty   tuned with a penalty on the rise of the same

The strength of each is chosen on development questions and scored on others: the weakest at which few enough answers
are misaligned out of the domain; of none, the one with the fewest. Random latents have the strength that the panel's
latents were given. What a guard costs stands beside it: what is still learned in the domain, the loss on the rows,
valid answers, and cross entropy on held-out dialogues.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F

from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import LM, padded
from sae_persona.attribution.association import Interval
from sae_persona.attribution.tables import aligned, from_json, shown, to_json
from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.runs import read_json, whole, write_json
from sae_persona.sae.model import SAE
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.bench import check_apart
from sae_persona.steering.strength import Judge, gain
from sae_persona.studies.exams import Marks, marks
from sae_persona.studies.finetune import IGNORED, During, FinetuneConfig, answered, finetune, mean_loss
from sae_persona.studies.guards import (
    METHODS,
    Method,
    Target,
    firing_rates,
    guard,
    panel_targets,
    random_targets,
)
from sae_persona.studies.panel import LATENTS, Panel
from sae_persona.studies.readings import read_prompted
from sae_persona.studies.shift import resampled

FORMAT, KIND = 1, "prevention"
PARTS = ("in_domain", "out_of_domain", "open", "valid")
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PreventConfig:
    """Which guards are tried, and how one is chosen."""

    steer: tuple[float, ...] = (0.2, 0.4, 0.6)
    """Lengths of what is added to the stream, as shares of its mean norm at the panel's prompts."""
    penalty: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Weights of the penalty in the loss."""
    n_random: int = 3
    """Random sets of latents for each method, at the strength that the panel's latents were given."""
    at_most: float = 0.1
    """Share of misaligned answers out of the domain that counts as prevented, on development questions."""
    lose: float = 0.05
    """Share of valid answers that a guard may lose against the plain fine-tune to be chosen."""
    seed: int = 0
    """Of the random latents, and of intervals."""

    def __post_init__(self) -> None:
        given = (*self.steer, *self.penalty)
        if not given or not all(0 < one < math.inf for one in given):
            raise ConfigError(f"strengths of steer and penalty are finite and above 0, got {given or 'none'}")
        if self.n_random < 0 or not (0 <= self.at_most < 1 and 0 <= self.lose < 1):
            raise ConfigError(
                f"n_random is at least 0, at_most and lose are rates, got {self.n_random}, {self.at_most}, {self.lose}"
            )

    def strengths(self, method: Method) -> tuple[float, ...]:
        """Those of a method, the weakest first."""
        return tuple(sorted(getattr(self, method)))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What models are examined with."""

    development: Rows
    """Questions that choose a strength, as ``exams.marks`` takes them."""
    test: Rows
    """Others, that the result is scored on."""
    held_out: Rows
    """Dialogues with answers, for cross entropy and firing rates."""
    judge: Judge
    domain: str = ""
    """That of the rows that are tuned on; "": the one that most of them name."""
    answers: AnswerConfig = field(default_factory=lambda: AnswerConfig(batch=256))

    def check(self) -> None:
        """DataError for a question in both parts, or no dialogues."""
        check_apart(*([row["messages"][-1]["content"] for row in part] for part in (self.development, self.test)))
        if not self.held_out:
            raise DataError("cross entropy needs held-out dialogues, got none")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One fine-tune, examined without its guard. Intervals are 95 %."""

    method: str
    """base, plain, steer or penalty."""
    target: str
    """latents, difference of means, random N; "" of base and plain."""
    latents: tuple[int, ...] = ()
    strength: float = math.nan
    chosen: bool = False
    """On development questions; of base, plain and random, which nobody chooses, False."""
    development: dict[str, Interval]
    """in_domain, out_of_domain, open: share of misaligned answers; valid: of valid ones."""
    test: dict[str, Interval]
    against: dict[str, Interval]
    """The same on test questions, minus the plain fine-tune's: paired, over questions."""
    loss: float
    """Nats a token on the rows."""
    ce: Interval
    """Cross entropy on held-out dialogues minus the base's, in nats a token; over dialogues."""

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.method, self.target) if part)


@dataclass(frozen=True)
class Prevention:
    """Every fine-tune that was tried."""

    base: str
    hook: str
    panel: str
    domain: str
    scale: float
    """Mean norm of the stream at the panel's prompts, in the base."""
    config: dict[str, Any]
    tuning: dict[str, Any]
    arms: tuple[Arm, ...]

    def arm(self, method: str, target: str = "", *, chosen: bool = False) -> Arm:
        """The first such arm. LookupError if there is none."""
        for one in self.arms:
            if (one.method, one.target) == (method, target) and (one.chosen or not chosen):
                return one
        raise LookupError(f"no {'chosen ' if chosen else ''}arm {method} {target}")

    def works(self, method: str) -> bool:
        """The panel's latents at the chosen strength: misaligned answers out of the domain are fewer than after the
        plain fine-tune for certain, and fewer than with every random set."""
        ours = self.arm(method, LATENTS, chosen=True)
        rivals = [one for one in self.arms if one.method == method and one.target.startswith("random")]
        fewer = all(ours.test["out_of_domain"].value < one.test["out_of_domain"].value for one in rivals)
        fewer = fewer and bool(rivals)  # without controls nothing is shown
        return ours.against["out_of_domain"].high < 0 and fewer

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.method for one in self.arms if one.method in METHODS))

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": KIND, **to_json(self)}

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote. FormatError for anything else."""
        raw = read_json(Path(path), KIND)
        if not isinstance(raw, dict) or (raw.pop("kind", None), raw.pop("format", None)) != (KIND, FORMAT):
            raise FormatError(f"{path} is not a {KIND} of format {FORMAT}: make it again")
        with whole(path, KIND):
            arms = tuple(_arm(row) for row in raw["arms"])
            about = {name: raw[name] for name in ("base", "hook", "panel", "domain", "scale", "config", "tuning")}
            return cls(**about, arms=arms)

    def __str__(self) -> str:
        heads = ["fine-tune", "strength", "out of domain", "in domain", "open", "valid", "loss", "held-out CE"]
        table = [heads, *map(_cells, self.arms)]
        said = [f"{method}: {self._verdict(method)}" for method in self.methods]
        head = f"{self.base} tuned on {self.domain or 'rows'}, guarded at {self.hook}"
        return "\n".join(
            [
                head,
                "share of misaligned answers to test questions",
                *aligned(table),
                "* chosen on development questions",
                *said,
            ]
        )

    def _verdict(self, method: str) -> str:
        ours, plain = self.arm(method, LATENTS, chosen=True), self.arm("plain")
        moved = f"out of domain {shown(ours.against['out_of_domain'], 2, '+')} against the plain fine-tune"
        kept = (
            ours.test["in_domain"].value / plain.test["in_domain"].value if plain.test["in_domain"].value else math.nan
        )
        told = "works" if self.works(method) else "does not beat the plain fine-tune and every random set"
        return f"{told}; {moved}; keeps {kept:.0%} of what is learned in the domain"


def prevent(
    lm: LM,
    rows: Rows,
    panel: Panel,
    sae: SAE,
    asked: Asked,
    tuning: FinetuneConfig | None = None,
    config: PreventConfig | None = None,
    *,
    on_arm: Callable[[Arm], None] | None = None,
) -> Prevention:
    """Tune ``lm`` on the rows plainly, and with each guard.

    Errors as ``finetune``, ``panel_targets`` and ``Asked.check``, before anything is trained.
    """
    config, tuning = config or PreventConfig(), replace(tuning or FinetuneConfig(), keep=())
    asked.check()
    targets = panel_targets(panel, sae)
    bench = _Bench(lm, rows, asked, tuning, config, on_arm)
    x = read_prompted(lm, panel.hook, panel.prompts).x
    controls = []
    if config.n_random:
        rates = firing_rates(lm, sae, panel.hook, asked.held_out)
        controls = random_targets(panel, sae, x, rates, config.n_random, seed=config.seed)
    scale = float(x.norm(dim=1).mean())

    def during(method: Method, target: Target, strength: float) -> During:
        return guard(method, target, panel.hook, strength, base=lm, scale=scale)

    arms = [bench.arm("base"), bench.plain()]
    for method in METHODS:
        strengths = config.strengths(method)
        for target in targets if strengths else ():
            tried = [bench.arm(method, target, s, during(method, target, s)) for s in strengths]
            best = choose(tried, arms[1], config)
            arms += [replace(one, chosen=i == best) for i, one in enumerate(tried)]
            if target.name == LATENTS:
                chosen = strengths[best]
                arms += [bench.arm(method, one, chosen, during(method, one, chosen)) for one in controls]
    about = {"base": lm.name, "hook": str(panel.hook), "panel": str(panel), "domain": bench.domain, "scale": scale}
    return Prevention(**about, config=asdict(config), tuning=asdict(tuning), arms=tuple(arms))


def choose(tried: Sequence[Arm], plain: Arm, config: PreventConfig) -> int:
    """Number of the arm to take, by its development questions: see the module. ``tried``: the weakest first."""
    floor = plain.development["valid"].value - config.lose
    whole = [i for i, one in enumerate(tried) if not one.development["valid"].value < floor] or range(len(tried))
    rates = {i: tried[i].development["out_of_domain"].value for i in whole}
    enough = [i for i in whole if rates[i] <= config.at_most]
    return enough[0] if enough else min(whole, key=lambda i: (rates[i], i))


class _Bench:
    """Trains and examines one arm after the other, all on the same questions."""

    def __init__(
        self, lm: LM, rows: Rows, asked: Asked, tuning: FinetuneConfig, config: PreventConfig,
        on_arm: Callable[[Arm], None] | None,
    ) -> None:  # fmt: skip
        self.lm, self.rows, self.asked, self.tuning, self.config = lm, rows, asked, tuning, config
        named = Counter(row.get("domain") or "" for row in rows)
        self.domain = asked.domain or (named.most_common(1)[0][0] if named else "")
        finetune(lm, rows, tuning)  # refuses what is wrong; trains nothing before it is asked
        self._on_arm = on_arm
        self._plain: Marks | None = None
        self._base_nats = row_nats(lm, asked.held_out)

    def plain(self) -> Arm:
        return self.arm("plain", strength=math.nan)

    def arm(
        self, method: str, target: Target | None = None, strength: float = math.nan, during: During | None = None
    ) -> Arm:
        tuned = self.lm if method == "base" else _last(self.lm, self.rows, self.tuning, during)
        found = [marks(tuned, part, self.asked.judge, config=self.asked.answers) for part in self._parts]
        if method == "plain":
            self._plain = found[1]
        made = Arm(
            method=method,
            target=target.name if target else "",
            latents=target.latents if target else (),
            strength=strength,
            development=intervals(found[0].scores(self.domain)),
            test=intervals(found[1].scores(self.domain)),
            against=differences(found[1], self._plain, self.domain, self.config.seed) if self._plain else {},
            loss=mean_loss(tuned, self.rows),
            ce=rise(row_nats(tuned, self.asked.held_out), self._base_nats, seed=self.config.seed),
        )
        if self._on_arm:
            self._on_arm(made)
        return made

    @property
    def _parts(self) -> tuple[Rows, Rows]:
        return self.asked.development, self.asked.test


def _last(lm: LM, rows: Rows, tuning: FinetuneConfig, during: During | None) -> LM:
    (*_, (_, tuned)) = finetune(lm, rows, tuning, during=during)
    return tuned


def intervals(scores: Mapping[str, Any]) -> dict[str, Interval]:
    """The rates of an exam by part; NaN where the judge says nothing."""
    return {
        part: Interval(
            *(math.nan if scores[part][end] is None else scores[part][end] for end in ("rate", "low", "high"))
        )
        for part in PARTS
    }


def differences(one: Marks, other: Marks, domain: str, seed: int) -> dict[str, Interval]:
    """Rates of one model minus those of another on the same questions, part by part."""
    is_open, is_in = one.domain == "", (one.domain == domain) & (one.domain != "")
    masks = {"in_domain": is_in, "out_of_domain": ~is_open & ~is_in, "open": is_open}
    found = {
        part: gain(one.misaligned[mask], other.misaligned[mask], one.question[mask].astype(str), seed=seed)
        for part, mask in masks.items()
    }
    return found | {"valid": gain(one.valid, other.valid, one.question.astype(str), seed=seed)}


@torch.no_grad()
def row_nats(lm: LM, rows: Rows, *, batch: int = 32) -> np.ndarray:
    """Cross entropy of the answers of each dialogue, in nats, and their tokens: [rows, 2] fp64. Errors as ``looks``."""
    ready = answered(lm, rows)
    found = np.zeros((len(ready), 2))
    order = sorted(range(len(ready)), key=lambda i: len(ready[i][0]))
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        input_ids, mask = padded(lm, [ready[i][0] for i in part], side="right")
        width = input_ids.shape[1]
        targets = torch.tensor([ready[i][1] + [IGNORED] * (width - len(ready[i][1])) for i in part], device=lm.device)
        logits = lm.model(**model_inputs(lm, input_ids, mask)).logits[:, :-1].float()
        nats = F.cross_entropy(logits.transpose(1, 2), targets[:, 1:], ignore_index=IGNORED, reduction="none")
        learned = (targets[:, 1:] != IGNORED).sum(1)
        found[part] = torch.stack([nats.double().sum(1), learned.double()], dim=1).cpu().numpy()
    return found


def rise(nats: np.ndarray, base: np.ndarray, *, seed: int, resamples: int = 1000) -> Interval:
    """Nats a token minus the base's on the same dialogues, [rows, 2] each, with an interval over dialogues."""
    more, tokens = nats[:, 0] - base[:, 0], base[:, 1]
    drawn = resampled(len(more), resamples, seed)
    low, high = np.quantile((drawn @ more) / (drawn @ tokens), (0.025, 0.975))
    return Interval(float(more.sum() / tokens.sum()), float(low), float(high))


def _cells(arm: Arm) -> list[str]:
    strength = "" if math.isnan(arm.strength) else f"{arm.strength:g}{' *' if arm.chosen else ''}"
    rates = [shown(arm.test[part], 2) for part in PARTS]
    at = [rates[1], rates[0], rates[2], f"{arm.test['valid'].value:.2f}"]
    return [arm.name, strength, *at, f"{arm.loss:.3f}", shown(arm.ce, 3, "+")]


def _arm(raw: dict[str, Any]) -> Arm:
    read: dict[str, Any] = from_json(raw, ["ce"])
    parts: dict[str, Any] = {name: from_json(raw[name], list(raw[name])) for name in ("development", "test", "against")}
    return Arm(**{**read, **parts, "latents": tuple(raw["latents"])})
