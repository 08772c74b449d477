"""The smallest set of latents whose edit brings a tuned model back to its base, on development questions.

For each mode, from the mildest: every candidate alone at a middle strength, and the best of these at every strength;
then, while the aim is not reached, strengths are moved by a step, and the best pair of a candidate more and a strength
is added (greedy); then latents are left out one by one as long as the aim stays reached. Of the modes that reach it the
one with the fewest latents is chosen, then the mildest. What was chosen so is flattered by its samples: clamps are
asked again with others, as they are and stronger, and the strength that then leaves least within the budget is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sae_persona.errors import ConfigError
from sae_persona.steering.interventions import Placed
from sae_persona.steering.positions import Positions, check_positions
from sae_persona.studies.candidates import MODES, Candidate, Mode
from sae_persona.studies.development import Development, Try

Member = tuple[Candidate, float]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a set is searched for."""

    max_latents: int = 5
    """Latents in a set at most."""
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Of clamps: how far beyond 0, in units of a latent's 90th percentile."""
    step: float = 0.25
    """By how much clamps of a set that does not reach the aim are moved, up to the strongest, as long as that helps."""
    caps: tuple[float, ...] = (0.1, 0.25)
    """Heights of ceilings, in the same units."""
    aim: float = 0.025
    """Excess over the base at which the search is content; below what is tested, for what is chosen is flattered."""
    budget: float = 0.05
    """Capability that a set may cost."""
    slack: float = 0.02
    """Losses up to this are taken for none: so many questions do not tell them apart."""
    retry: int = 4
    """Candidates, the best alone, that are tried beside those that were chosen."""
    factors: tuple[float, ...] = (1.0, 1.25, 1.5)
    """What the strengths of the chosen clamps are multiplied by when they are asked again."""
    times: int = 2
    """How often they are asked again, with other samples."""
    positions: Positions = "answer"
    """Tokens that are edited."""

    def __post_init__(self) -> None:
        check_positions(self.positions)
        if min(self.max_latents, self.retry, self.times) < 1 or not (self.strengths and self.caps and self.factors):
            raise ConfigError(
                "max_latents, retry and times are at least 1, strengths, caps and factors at least one value, "
                f"got {self.max_latents}, {self.retry}, {self.times}, {self.strengths}, {self.caps} and {self.factors}"
            )
        if min(*self.strengths, *self.factors) <= 0 or min(*self.caps, self.step) < 0:
            raise ConfigError(
                "strengths and factors are above 0, caps and step at least 0, "
                f"got {self.strengths}, {self.factors}, {self.caps} and {self.step}"
            )
        if not (0 <= self.aim < 1 and 0 <= self.budget < 1 and 0 <= self.slack < 1):
            raise ConfigError(f"aim, budget and slack are shares, got {self.aim}, {self.budget} and {self.slack}")

    def levels(self, mode: Mode) -> tuple[float, ...]:
        """The strengths that a mode knows."""
        return {"ablate": (0.0,), "cap": self.caps, "clamp": self.strengths}[mode]


@dataclass(frozen=True)
class Found:
    """The set that a mode ends with."""

    mode: Mode
    members: tuple[Member, ...]
    tried: Try
    without: tuple[float, ...]
    """Excess without each member alone, in their order; of a set of one, that of the tuned model."""
    reached: bool
    n_tries: int

    def edits(self, positions: Positions) -> list[Placed]:
        """What is applied."""
        return edits_of(self.members, self.mode, positions)


def edits_of(members: Sequence[Member], mode: Mode, positions: Positions) -> list[Placed]:
    """The edits of a set."""
    return [candidate.edit(mode, strength, positions) for candidate, strength in members]


def reaches(tried: Try, config: SearchConfig) -> bool:
    """Whether the aim is reached within the budget."""
    return tried.excess <= config.aim and tried.loss <= config.budget


def order(tried: Try, strength: float, config: SearchConfig) -> tuple[float, ...]:
    """What sorts tries, the best first: least beyond the aim and the budget together, least loss, excess, strength.

    A latent that undoes much at too high a price stays in the search: others may pay for it, or a weaker clamp.
    """
    beyond = max(tried.excess - config.aim, 0.0) + max(tried.loss - config.budget, 0.0)
    return (beyond, max(tried.loss, config.slack), max(tried.excess, 0.0), strength)


Worthy = tuple[tuple[float, ...], tuple[Member, ...], Try]
"""What sorts a set, the set, and what it did."""


@dataclass(eq=False)
class _Search:
    dev: Development
    mode: Mode
    config: SearchConfig

    def tries(self, sets: Iterator[tuple[Member, ...]]) -> list[Worthy]:
        """Every set with what it is worth, the best first."""
        found = []
        for members in sets:
            tried = self.dev.of(edits_of(members, self.mode, self.config.positions))
            found.append((order(tried, sum(s for _, s in members), self.config), members, tried))
        return sorted(found, key=lambda one: one[0])

    def grown(self, candidates: Sequence[Candidate]) -> Worthy:
        """Greedy."""
        levels = self.config.levels(self.mode)
        middle = levels[(len(levels) - 1) // 2]
        first = self.tries(((candidate, middle),) for candidate in candidates)
        ranked = [members[0][0] for _, members, _ in first[: self.config.retry + 1]]
        others = self.tries(((candidate, s),) for candidate in ranked for s in levels if s != middle)
        best = self.moved(min([*first, *others], key=lambda one: one[0]))
        while not reaches(best[2], self.config) and len(best[1]) < self.config.max_latents:
            taken = {candidate for candidate, _ in best[1]}
            rest = [(candidate, s) for candidate in ranked if candidate not in taken for s in levels]
            members = best[1]
            more = self.tries((*members, one) for one in rest)
            if not more or more[0][0] >= best[0]:
                break
            best = self.moved(more[0])
        return best

    def moved(self, best: Worthy) -> Worthy:
        """With each strength a step up or down, as long as that helps and the aim is not reached."""
        step, most = self.config.step, max(self.config.strengths)
        while self.mode == "clamp" and step and not reaches(best[2], self.config):
            members = best[1]
            near = (
                (*members[:i], (candidate, round(strength + by, 6)), *members[i + 1 :])
                for i, (candidate, strength) in enumerate(members)
                for by in (step, -step)
                if 0 < strength + by <= most
            )
            tried = self.tries(near)
            if not tried or tried[0][0] >= best[0]:
                break
            best = tried[0]
        return best

    def pruned(self, grown: Worthy) -> tuple[tuple[Member, ...], Try, tuple[float, ...]]:
        """Leave one out, as long as that is no worse or the aim stays reached; and what each is needed for."""
        _, members, tried = grown
        while len(members) > 1:
            without = {}
            for _, rest, found in self.tries(members[:i] + members[i + 1 :] for i in range(len(members))):
                without[rest] = found
            rest, best = next(iter(without.items()))
            if not (reaches(best, self.config) or self._worth(rest, best) <= self._worth(members, tried)):
                lost = [without[members[:i] + members[i + 1 :]].excess for i in range(len(members))]
                return members, tried, tuple(lost)
            members, tried = rest, best
        return members, tried, (self.dev.untreated.excess,)

    def _worth(self, members: tuple[Member, ...], tried: Try) -> tuple[float, ...]:
        return order(tried, sum(s for _, s in members), self.config)


def minimal_set(
    dev: Development,
    candidates: Sequence[Candidate],
    config: SearchConfig | None = None,
    *,
    on_found: Callable[[Found], None] | None = None,
) -> list[Found]:
    """The set of each mode that has a candidate, the chosen one first. ConfigError if there is no candidate."""
    config = config or SearchConfig()
    if not candidates:
        raise ConfigError("there is no latent to edit: give candidates")
    found = []
    for mode in MODES:
        can = [candidate for candidate in candidates if candidate.can(mode)]
        if not can:
            continue
        before, search = dev.n, _Search(dev, mode, config)
        members, tried, without = search.pruned(search.grown(can))
        found.append(Found(mode, members, tried, without, reaches(tried, config), dev.n - before))
        if on_found:
            on_found(found[-1])
    best, *others = sorted(found, key=lambda one: _preference(one, config))
    return [firm(dev, best, config), *others]


def firm(dev: Development, found: Found, config: SearchConfig) -> Found:
    """A set of clamps at the strength that leaves least within the budget, on other samples; others as they are."""
    if found.mode != "clamp":
        return found
    before, tried = dev.n, []
    for factor in config.factors:
        members = tuple((candidate, round(strength * factor, 6)) for candidate, strength in found.members)
        again = dev.again(edits_of(members, "clamp", config.positions), config.times)
        affordable = again.loss <= config.budget
        tried.append(((not affordable, *order(again, factor, replace(config, aim=0.0))), members, again))
    _, members, again = min(tried, key=lambda one: one[0])
    n = found.n_tries + dev.n - before
    return replace(found, members=members, tried=again, reached=reaches(again, config), n_tries=n)


def _preference(one: Found, config: SearchConfig) -> tuple[float, ...]:
    if one.reached:
        return (0, len(one.members), MODES.index(one.mode))
    return (1, *order(one.tried, sum(s for _, s in one.members), config))
