"""Rankings of SAEs that are each other's permutations, rotations or strangers."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from sae_persona.attribution.stability import StabilityConfig, stability
from sae_persona.errors import ConfigError, DataError, ModelError
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU

D_IN, N, TOP = 40, 90, 5
CONFIG = StabilityConfig(top=TOP, draws=99)
BEST = [3, 1, 4, 15, 9]


def of_directions(directions: torch.Tensor) -> SAE:
    n, d_in = directions.shape
    unit = torch.nn.functional.normalize(directions, dim=1)
    return SAE(unit, torch.zeros(n), unit, torch.zeros(d_in), ReLU(), {"hook": "layers.2.resid_post"})


@pytest.fixture(scope="module")
def first() -> SAE:
    return of_directions(torch.randn(N, D_IN, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def stranger() -> SAE:
    return of_directions(torch.randn(2 * N, D_IN, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def permuted(first):
    """The same latents in another order, a little off; where each has gone."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(3))
    return of_directions(first.w_dec[order] + 0.03 * noise), order.argsort()


def test_a_permuted_sae_keeps_the_ranking(first, permuted, make_ranking):
    second, where = permuted
    moved = [int(where[i]) for i in BEST]
    found = stability([first, second], [make_ranking(BEST), make_ranking(moved)], CONFIG, names=["a", "b"])
    assert found.survives and [(one.a, one.b) for one in found.comparisons] == [("a", "b"), ("b", "a")]
    one = found.comparisons[0]
    assert [m.nearest for m in one.matches] == moved and [m.other_rank for m in one.matches] == [1, 2, 3, 4, 5]
    assert (one.matched, one.matched_random, one.survives, one.overlap_at_top) == (1, 1, 1, 1)
    assert one.spearman == pytest.approx(1) and one.subspace > 0.9 and one.subspace_p == 0.01
    assert one.overlap_by_chance == TOP / N and one.angles[0] < 15
    assert "a -> b" in str(found) and found.to_json()["comparisons"][0]["survival"] == "ranking"


@pytest.mark.parametrize("change", ["sign", "p", "place"])
def test_a_match_that_is_ranked_otherwise_is_not_survival(first, permuted, make_ranking, change):
    second, where = permuted
    moved = [int(where[i]) for i in BEST]
    others = [i for i in range(N) if i not in moved][:TOP]
    other = {
        "sign": make_ranking(moved, z=-9.0),
        "p": make_ranking(moved, p=0.4),
        "place": make_ranking(others),
    }[change]
    one = stability([first, second], [make_ranking(BEST), other], CONFIG).comparisons[0]
    assert (one.matched, one.survives) == (1, 0)
    # the span is that of the other ranking's best latents
    assert one.survival == ("none" if change == "place" else "subspace")
    assert one.overlap_at_top == (0 if change == "place" else 1)


def test_rotated_within_its_span_only_the_subspace_survives(first, make_ranking):
    """No direction is kept, yet the five span what they spanned."""
    span = torch.linalg.qr(first.w_dec[BEST].T)[0]
    directions = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(5))
    turned = torch.linalg.qr(torch.randn(TOP, TOP, generator=torch.Generator().manual_seed(6)))[0]
    directions[:TOP] = (span @ turned).T
    second = of_directions(directions)
    one = stability(
        [first, second], [make_ranking(BEST), make_ranking(range(TOP))], replace(CONFIG, cosine=0.95)
    ).comparisons[0]
    assert one.survival == "subspace" and one.subspace == pytest.approx(1, abs=1e-6)
    assert max(one.angles) < 0.1


def test_strangers_share_nothing(first, stranger, make_ranking):
    found = stability([first, stranger], [make_ranking(BEST), make_ranking([2, 7, 1, 8, 100])], CONFIG)
    assert [one.survival for one in found.comparisons] == ["none", "none"] and not found.survives
    assert all(0.03 < one.subspace < 0.3 and one.subspace_p > 0.05 for one in found.comparisons)
    assert found.comparisons[0].overlap_by_chance == TOP / (2 * N)
    assert np.isnan(found.comparisons[0].spearman)


def test_the_null_of_strangers_is_uniform(make_ranking):
    """Over pairs of SAEs with nothing in common, one in five overlaps more than four fifths of random sets do."""
    p = []
    for seed in range(40):
        a, b = (
            of_directions(torch.randn(N, 12, generator=torch.Generator().manual_seed(s))) for s in (seed, 99 + seed)
        )
        config = StabilityConfig(top=3, draws=49, seed=seed)
        p.append(stability([a, b], [make_ranking(BEST), make_ranking(BEST)], config).comparisons[0].subspace_p)
    assert 0.35 < np.mean(p) < 0.65 and 0.05 < np.mean(np.array(p) <= 0.2) < 0.4


def test_a_ranking_that_tells_nothing_is_untested(first, permuted, make_ranking):
    one = stability([first, permuted[0]], [make_ranking(BEST, p=0.6)] * 2, CONFIG).comparisons[0]
    assert (one.survival, one.telling) == ("untested", 0) and np.isnan(one.survives)


def test_bad_input(first, stranger, make_ranking):
    good = make_ranking(BEST)
    with pytest.raises(DataError, match="two SAEs or more"):
        stability([first], [good], CONFIG)
    with pytest.raises(DataError, match="rankings of one persona"):
        stability([first, stranger], [good, replace(good, persona="rude")], CONFIG)
    with pytest.raises(ModelError, match="width 7 at .* and width 40"):
        stability([first, of_directions(torch.randn(9, 7))], [good, good], CONFIG)
    with pytest.raises(ConfigError, match="SAE 0 ranks 5 latents, fewer than top 10"):
        stability([first, stranger], [good, good])
    with pytest.raises(DataError, match="the ranking of b is of another SAE: this one has 90 latents"):
        stability([stranger, first], [good, make_ranking([100, 1, 2, 3, 4])], CONFIG, names=["a", "b"])
    for setting in ({"top": 0}, {"draws": 0}, {"cosine": 0.0}, {"cosine": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            StabilityConfig(**setting)
    assert StabilityConfig(**asdict(CONFIG)) == CONFIG
