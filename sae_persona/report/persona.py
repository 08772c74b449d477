"""One persona of a run, gathered for its section of the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from sae_persona.attribution.ranking import RankedLatent, Ranking
from sae_persona.features.contexts import Context, TopContexts
from sae_persona.report.verdict import about_ranking, about_sweep, find
from sae_persona.runs import Run
from sae_persona.steering.arms import Arm, Sweep


@dataclass(frozen=True)
class Token:
    """A token of a context: its text, the latent's activation on it, and that as a share of the strongest shown."""

    text: str
    act: float
    share: float


@dataclass(frozen=True)
class SideEffect:
    """Change of another trait's rate, by arm; NaN where its questions cannot show it."""

    trait: str
    latent: float
    dense: float
    prompt: float
    random: float
    """Of the random latent that moves it most."""


@dataclass(frozen=True)
class PersonaView:
    """What the template reads of one persona. Whatever the run does not have is None or empty."""

    name: str
    anchor: str
    ranking: Ranking | None
    swept: Sweep | None
    contexts: Sequence[Sequence[Token]]
    exported: str | None

    @property
    def latent(self) -> int | None:
        """The clamped latent, else the best one."""
        if self.swept:
            return self.swept.latent
        return self.ranking[0].latent if self.ranking else None

    @property
    def row(self) -> RankedLatent | None:
        """The latent's row in the ranking, if it is among those kept."""
        return next((row for row in self.ranking or () if row.latent == self.latent), None)

    @property
    def verdict(self) -> list[list[str]]:
        """A paragraph on how well the latent tells the persona, and one on what clamping it does."""
        parts = [about_ranking(self.ranking, self.row) if self.ranking else []]
        parts += [about_sweep(self.swept) if self.swept else []]
        return [said for said in parts if said]

    def arm(self, kind: str) -> Arm | None:
        return find(self.swept, kind) if self.swept else None

    @property
    def answers(self) -> list[tuple[str, str, str]]:
        """Question, answer before, answer under the chosen clamp."""
        base = self.arm("baseline")
        if self.swept is None or base is None:
            return []
        pairs = zip(base.examples, self.swept.chosen.examples, strict=True)
        return [(question, before, after) for (question, before), (_, after) in pairs]

    @property
    def side_effects(self) -> list[SideEffect]:
        """Every trait that the judge read beside the persona, largest change first; whether answers are valid last."""
        if self.swept is None:
            return []
        arms = [self.swept.chosen, self.arm("difference of means"), self.arm("prompt")]
        traits = sorted({trait for arm in self.swept.arms for trait in arm.side_effects})
        rows = [_side_effect(trait, arms, self.swept.randoms, lambda arm, t=trait: _change(arm, t)) for trait in traits]
        rows = [row for row in rows if any(map(math.isfinite, (row.latent, row.dense, row.prompt)))]
        rows.sort(key=lambda row: -abs(row.latent) if math.isfinite(row.latent) else 1)
        base = self.arm("baseline")
        if base and math.isfinite(base.valid.value):
            before = base.valid.value
            rows.append(_side_effect("valid answers", arms, self.swept.randoms, lambda arm: arm.valid.value - before))
        return rows

    @property
    def widest(self) -> float:
        """The change that fills half of a side effect's bar: the largest, and 10 points at least."""
        shown = [value for row in self.side_effects for value in (row.latent, row.dense, row.prompt, row.random)]
        return max([0.1, *(abs(value) for value in shown if math.isfinite(value))])

    @property
    def development(self) -> list[tuple[str, list[Arm]]]:
        """What was tried on development questions: a name, and its arms by strength."""
        tried: dict[str, list[Arm]] = {}
        for arm in self.swept.arms if self.swept else ():
            if arm.part == "development" and arm.kind != "baseline":
                tried.setdefault(f"latent {arm.latent}" if arm.kind == "latent" else arm.kind, []).append(arm)
        return list(tried.items())


def _change(arm: Arm, trait: str) -> float:
    value = arm.side_effects.get(trait)
    return math.nan if value is None else value


def _side_effect(
    trait: str, arms: Sequence[Arm | None], randoms: Sequence[Arm], of: Callable[[Arm], float]
) -> SideEffect:
    latent, dense, prompt = (of(arm) if arm else math.nan for arm in arms)
    known = [value for value in map(of, randoms) if math.isfinite(value)]
    return SideEffect(trait, latent, dense, prompt, max(known, key=abs, default=math.nan))


def shaded(tokenizer: Any, contexts: Sequence[Context]) -> list[list[Token]]:
    """Contexts as tokens with their activations, shaded by the strongest of all."""
    peak = max((context.strength for context in contexts), default=1.0)
    return [
        [
            Token(text, act, act / peak)
            for text, act in zip(pieces(tokenizer, context.tokens), context.acts, strict=True)
        ]
        for context in contexts
    ]


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; line breaks as ⏎. A character of several tokens is put on its last."""
    found, before = [], ""
    for i in range(len(ids)):
        whole = tokenizer.decode(ids[: i + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = whole.rstrip("\N{REPLACEMENT CHARACTER}") if i + 1 < len(ids) else whole
        found.append(whole[len(before) :].replace("\n", "⏎"))
        before = whole
    return found


def gather(run: Run, contexts: TopContexts | None, tokenizer: Any) -> list[PersonaView]:
    """Every persona that was ranked or swept, in the order in which it was ranked first."""
    folders = ("rankings", "sweeps")
    files = {unquote(path.stem) for folder in folders for path in (run.path / folder).glob("*.json")}
    ranked = [entry["persona"] for entry in run.manifest["stages"] if "persona" in entry]
    names = [name for name in dict.fromkeys([*ranked, *sorted(files)]) if name in files]
    return [_view(run, name, f"persona-{i}", contexts, tokenizer) for i, name in enumerate(names, start=1)]


def _view(run: Run, name: str, anchor: str, contexts: TopContexts | None, tokenizer: Any) -> PersonaView:
    ranking = Ranking.load(run.ranking(name)) if run.ranking(name).is_file() else None
    swept = Sweep.load(run.sweep(name)) if run.sweep(name).is_file() else None
    exported = f"interventions/{name}.json" if run.intervention(name).is_file() else None
    bare = PersonaView(name, anchor, ranking, swept, (), exported)
    if contexts is None or bare.latent is None:
        return bare
    return PersonaView(name, anchor, ranking, swept, shaded(tokenizer, contexts.of(bare.latent)), exported)
