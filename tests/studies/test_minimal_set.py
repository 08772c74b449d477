"""The search, on a development set whose answer to every edit is written down."""

from dataclasses import replace

import pytest

from sae_persona.errors import ConfigError
from sae_persona.steering.interventions import Ablate, Ceiling, Clamp
from sae_persona.studies.candidates import Candidate
from sae_persona.studies.development import Try
from sae_persona.studies.minimal_set import SearchConfig, minimal_set, order, reaches
from sae_persona.types import HookPoint

CONFIG = SearchConfig(strengths=(0.5, 1.0, 2.0), caps=(0.1,), step=0.25, factors=(1.0,), times=1)


def latent(i: int, rise: float = 1.0) -> Candidate:
    return Candidate(HookPoint(0), i, rise, 1.0, 0.0, 1.0)


class Written:
    """Each unit of strength of a latent undoes ``effect[latent]``; ablation and caps half of that; and costs."""

    def __init__(self, effect, cost=0.0):
        self.effect, self.cost, self.n, self.seen = effect, cost, 0, []
        self.untreated = self.of([])

    def again(self, edits, times):
        return self.of(edits)

    def of(self, edits):
        self.n += 1
        strengths = {}
        for one in edits:
            edit = one.edit
            strengths[edit.latent] = abs(edit.strength) if isinstance(edit, Clamp) else 0.5
            assert isinstance(edit, Clamp | Ablate | Ceiling)
        self.seen.append(strengths)
        undone = sum(self.effect.get(i, 0.0) * s for i, s in strengths.items())
        loss = self.cost * sum(s for _, s in strengths.items())
        return Try({"out of domain": 1 - undone}, round(1 - undone, 6), loss)


def test_one_latent_is_enough_where_it_is():
    dev = Written({1: 0.5, 2: 0.1})
    best = minimal_set(dev, [latent(1), latent(2)], CONFIG)[0]
    assert [(c.latent, s) for c, s in best.members] == [(1, 2.0)] and best.mode == "clamp" and best.reached
    assert best.without == (1.0,)


def test_sets_grow_until_they_reach_and_no_further():
    dev = Written({1: 0.3, 2: 0.3, 3: 0.3, 4: 0.05})
    best = minimal_set(dev, [latent(i) for i in (1, 2, 3, 4)], CONFIG)[0]
    assert best.reached and len(best.members) == 2 and 4 not in [c.latent for c, _ in best.members]
    assert all(excess > CONFIG.aim for excess in best.without), "each is needed"


def test_what_is_not_needed_in_the_end_is_left_out():
    """Greedy takes the strongest first; two others together make it unnecessary."""

    class Together(Written):
        def of(self, edits):
            found = super().of(edits)
            ids = {one.edit.latent for one in edits}
            return Try(found.rates, 0.0, 0.0) if {2, 3} <= ids else found

    dev = Together({1: 0.2, 2: 0.15, 3: 0.15})
    best = minimal_set(
        dev, [latent(i) for i in (1, 2, 3)], SearchConfig(strengths=(1.0,), caps=(0.1,), step=0, factors=(1.0,))
    )[0]
    assert best.reached and {c.latent for c, _ in best.members} == {2, 3}


def test_the_mildest_of_the_smallest_is_chosen():
    best, *others = minimal_set(Written({1: 2.0}), [latent(1)], CONFIG)
    assert best.mode == "ablate" and {one.mode for one in others} == {"cap", "clamp"} and best.n_tries == 1
    best = minimal_set(Written({1: 1.0, 2: 1.0}), [latent(1), latent(2)], CONFIG)[0]
    assert best.mode == "clamp" and len(best.members) == 1, "one clamped rather than two ablated"


def test_the_budget_binds_and_strengths_are_moved_by_steps():
    dev = Written({1: 0.8}, cost=0.04)
    best = minimal_set(dev, [latent(1)], CONFIG)[0]
    assert best.mode == "clamp" and best.members[0][1] == 1.25 and best.reached
    dear = minimal_set(Written({1: 0.8}, cost=0.9), [latent(1)], CONFIG)[0]
    assert not dear.reached and dear.tried.loss > CONFIG.budget
    assert dear.members[0][1] < 0.8, "what costs more than it undoes is not made stronger"


def test_a_latent_that_costs_too_much_is_not_crowded_out_by_cheap_ones():
    """Alone at the middle strength it is beyond the budget, and more cheap ones than are tried again are not."""

    class Dear(Written):
        def of(self, edits):
            found = super().of(edits)
            strength = {one.edit.latent: getattr(one.edit, "strength", 0.5) for one in edits}
            return replace(found, loss=0.08 * abs(strength.get(1, 0.0)))

    effect = {1: 1.0} | {i: 0.02 * i for i in range(2, 9)}
    config = replace(CONFIG, strengths=(0.5, 1.0), retry=2)
    best = minimal_set(Dear(effect), [latent(i) for i in effect], config)[0]
    assert [c.latent for c, _ in best.members] == [1] and best.tried.excess <= config.aim
    assert not best.reached and best.tried.loss == 0.08, "it says what that costs"


def test_latents_are_at_most_as_many_as_allowed():
    few = SearchConfig(strengths=(1.0,), caps=(0.1,), max_latents=2, step=0, factors=(1.0,))
    best = minimal_set(Written({i: 0.2 for i in range(5)}), [latent(i) for i in range(5)], few)[0]
    assert len(best.members) == 2 and not best.reached


def test_what_was_chosen_is_asked_again_and_made_firm():
    class Flattered(Written):
        """Other samples show a third more misalignment."""

        def again(self, edits, times):
            found = self.of(edits)
            assert times == 3
            return Try(found.rates, max(0.0, found.excess) + 0.3 * (abs(edits[0].edit.strength) < 1.4), found.loss)

    config = replace(CONFIG, factors=(1.0, 1.25, 1.5, 2.0), times=3)
    best = minimal_set(Flattered({1: 1.0}, cost=0.02), [latent(1)], config)[0]
    assert best.members[0][1] == 1.5 and best.reached, "the mildest that leaves nothing"
    dear = minimal_set(Flattered({1: 1.0}, cost=0.045), [latent(1)], config)[0]
    assert dear.members[0][1] == 1.0 and not dear.reached, "firmer is beyond the budget, and it says so"


def test_what_fell_is_only_clamped():
    found = minimal_set(Written({1: 0.6}), [latent(1, -1.0)], CONFIG)
    assert [one.mode for one in found] == ["clamp"] and found[0].edits("answer")[0].edit.strength > 0


def test_what_is_beyond_aim_and_budget_by_least_comes_first():
    config = SearchConfig()
    good, dear, mild, idle = Try({}, 0.0, 0.03), Try({}, 0.0, 0.2), Try({}, 0.01, 0.0), Try({}, 0.5, 0.0)
    assert order(mild, 1, config) < order(good, 1, config) < order(dear, 1, config) < order(idle, 1, config)
    assert order(good, 1, config) < order(good, 2, config)
    assert reaches(good, config) and not reaches(dear, config) and not reaches(Try({}, 0.03, 0.0), config)


def test_bad_configs_are_refused():
    for wrong in (
        {"max_latents": 0},
        {"strengths": ()},
        {"strengths": (0.0,)},
        {"caps": (-1.0,)},
        {"budget": 2.0},
        {"times": 0},
        {"factors": ()},
    ):
        with pytest.raises(ConfigError):
            SearchConfig(**wrong)
    with pytest.raises(ConfigError, match="no latent to edit"):
        minimal_set(Written({}), [], CONFIG)
