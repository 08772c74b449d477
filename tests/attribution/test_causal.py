"""screen() on a planted case: latents built to carry the answer, beside ones that only go along."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr, ttest_1samp
from scipy.stats import t as student

from sae_persona.attribution.ablation import exact_effects
from sae_persona.attribution.association import Interval
from sae_persona.attribution.causal import ScreenConfig, holm, over_units, screen, verdict
from sae_persona.attribution.contrasts import Contrast, read_contrasts, split_pairs
from sae_persona.attribution.metrics import read_and_grade, rows_of, sides_of
from sae_persona.attribution.patching import attribute
from sae_persona.attribution.screens import Screen
from sae_persona.errors import ConfigError, DataError, FormatError, ModelError
from sae_persona.lab.contrasts import contrasts
from sae_persona.types import HookPoint

HOOK = HookPoint(2)
PERSONA, AGAINST, SILENT = 5, 6, 7
CONFIG = ScreenConfig(screened=3, attributed=2, controls=30, integration=2, resamples=100, positions="pre")


@pytest.fixture(scope="module")
def pairs() -> list[Contrast]:
    """Twenty of each split; some of the held-out questions are asked several times."""
    return read_contrasts([row for part in ("train", "held_out") for row in contrasts("formal", 20, part)])


@pytest.fixture(scope="module")
def planted(lm, sae, pairs):
    """Latents 5 and 6 always fire; their directions are up and down the metric's gradient. Latent 7 never fires."""
    sides = sides_of(lm, pairs, "pre")
    rows = rows_of(lm, sides)
    _, g = read_and_grade(lm, HOOK, rows, "sum")
    uphill = (torch.tensor([float(side.sign) for side in sides])[:, None] * g).sum(0)
    w_enc, b_enc, w_dec = sae.w_enc.clone(), sae.b_enc.clone(), sae.w_dec.clone()
    w_enc[[PERSONA, AGAINST, SILENT]] = 0
    b_enc[[PERSONA, AGAINST, SILENT]] = torch.tensor([20.0, 20.0, -1.0])
    w_dec[PERSONA], w_dec[AGAINST] = uphill / uphill.norm(), -uphill / uphill.norm()
    return type(sae)(w_enc, b_enc, w_dec, sae.b_dec, sae.rule, sae.metadata)


@pytest.fixture(scope="module")
def found(lm, planted, pairs, make_ranking) -> Screen:
    ranking = make_ranking([PERSONA, AGAINST, SILENT], z={PERSONA: 9, AGAINST: 8, SILENT: 7})
    return screen(lm, planted, ranking, pairs, CONFIG, output_scores={AGAINST: 0.5})


def test_verdicts_of_planted_latents(found):
    persona, against, silent = found[:3]
    assert (persona.latent, persona.rank, persona.verdict) == (PERSONA, 1, "causal")
    assert persona.effect.high < 0 and persona.p_random == 1 / (1 + len(found.random.latents))
    assert (against.verdict, against.output_score) == ("opposite", 0.5)
    assert against.effect.low > 0
    assert (silent.verdict, silent.effect, silent.fires) == ("silent", Interval(0, 0, 0), 0)
    assert found.causal == (persona,)
    assert {row.rank for row in found[3:]} == {None}


def test_effects_are_of_held_out_pairs_and_estimates_of_train_pairs(lm, planted, found, pairs):
    train, held_out = (sides_of(lm, part, "pre") for part in split_pairs(pairs))
    latents = [row.latent for row in found]
    effects = exact_effects(lm, planted, HOOK, held_out, torch.tensor(latents))
    questions = np.unique([pair.question for pair in split_pairs(pairs)[1]], return_inverse=True)[1]
    means = [effects.change.numpy()[questions == i].mean(0) for i in range(found.n_questions)]
    np.testing.assert_allclose([row.effect.value for row in found], np.mean(means, axis=0), atol=1e-4)
    estimates = attribute(lm, planted, HOOK, train, integration=2)
    np.testing.assert_allclose([row.estimate for row in found], estimates.effect[latents], atol=1e-4)
    sizes = estimates.effect.abs().sort(descending=True).values
    for row in found:
        assert abs(row.estimate) == pytest.approx(float(sizes[row.estimate_rank - 1]), abs=1e-4)
    means = [effects.base.numpy()[questions == i].mean() for i in range(found.n_questions)]
    assert found.base.value == pytest.approx(float(np.mean(means)), abs=1e-4)
    assert (found.n_train, found.n_held_out) == (20, 20) and 5 <= found.n_questions < 20


def test_controls_are_near_and_none_is_a_candidate(lm, planted, found, pairs):
    controls = set(found.random.latents)
    assert len(controls) == 30 and not controls & {PERSONA, AGAINST, SILENT}
    rate = attribute(lm, planted, HOOK, sides_of(lm, split_pairs(pairs)[0], "pre")).rate
    others = [i for i in range(60) if i not in controls and rate[i] > 0 and i not in (PERSONA, AGAINST)]
    assert float(rate[list(controls)].mean()) > float(rate[others].mean())  # what tells the persona fires always


def test_a_candidate_that_is_a_control_is_not_held_against_itself(found):
    """Latents that only their estimate brought in are among the controls, or the others would look small."""
    named = dict(zip(found.random.latents, np.abs(found.random.effects), strict=True))
    both = [row for row in found[3:] if row.latent in named]
    assert both
    rates = dict(zip(found.random.latents, found.random.rates, strict=True))
    for row in both:
        others = [
            size
            for latent, size in named.items()
            if latent != row.latent and (not row.like or row.rate / 2 <= rates[latent] <= row.rate * 2)
        ]
        assert row.p_random == pytest.approx(np.mean([1, *(size >= abs(row.effect.value) for size in others)]))


def test_of_few_questions_intervals_are_over_pairs_and_there_is_no_verdict(lm, planted, pairs, make_ranking, found):
    same = [replace(pair, messages=pairs[0].messages) for pair in pairs]
    few = screen(lm, planted, make_ranking([PERSONA, SILENT]), same, replace(CONFIG, screened=2))
    assert (few.n_questions, few.over, found.over) == (1, "pairs", "questions")
    assert few[0].effect.low < few[0].effect.value < few[0].effect.high < 0
    assert [row.verdict for row in few[:2]] == ["few questions", "silent"] and few.causal == ()
    assert "held-out pairs on 1 questions, intervals over pairs" in str(few)
    assert "warning: 1 questions are too few for a verdict" in str(few) and "too few for" not in str(found)


def test_intervals_and_p_are_of_t_over_the_questions_means():
    rng = np.random.default_rng(0)
    unit, values = np.repeat(np.arange(7), [1, 4, 2, 3, 1, 1, 2]), rng.normal(0.5, 1, (14, 3))
    values[:, 2] = 0
    means = np.stack([values[unit == i].mean(0) for i in range(7)])
    effects, p = over_units(values, unit)
    for i in range(2):
        wanted = ttest_1samp(means[:, i], 0)
        assert (effects.value[i], p[i]) == pytest.approx((means[:, i].mean(), wanted.pvalue))
        assert (effects.low[i], effects.high[i]) == pytest.approx(tuple(wanted.confidence_interval()))
    assert (effects.value[2], effects.low[2], effects.high[2], p[2]) == (0, 0, 0, 1)


@pytest.mark.parametrize("n", [5, 8, 20])
def test_of_few_questions_t_holds_its_level(n):
    """The percentile bootstrap rejects 17, 12 and 8 % of such samples."""
    _, p = over_units(np.random.default_rng(n).normal(size=(n, 20_000)), np.arange(n))
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.005)


def test_holms_correction_is_of_the_latents_that_were_tested(found):
    assert holm(np.array([0.04, 0.01, 0.02, 0.9])) == pytest.approx([0.08, 0.04, 0.06, 0.9])
    tested = [row for row in found if row.fires]
    freedom = found.n_questions - 1
    errors = [(row.effect.high - row.effect.value) / student.ppf(0.975, freedom) for row in tested]
    unadjusted = [
        2 * student.sf(abs(row.effect.value) / error, freedom) for row, error in zip(tested, errors, strict=True)
    ]
    assert [row.p_effect for row in tested] == pytest.approx(holm(np.array(unadjusted)), rel=1e-3)
    assert found[2].p_effect == 1 and len(tested) == len(found) - 1


def test_controls_fire_as_often_as_their_candidate_or_the_table_warns(lm, planted, found, pairs, make_ranking):
    rate = attribute(lm, planted, HOOK, sides_of(lm, split_pairs(pairs)[0], "pre")).rate
    assert found.random.rates == pytest.approx(rate[list(found.random.latents)].tolist())
    for row in found:
        near = [r for i, r in zip(found.random.latents, found.random.rates, strict=True) if i != row.latent]
        near = [r for r in near if row.rate / 2 <= r <= row.rate * 2]
        assert row.rate == pytest.approx(float(rate[row.latent])) and row.like == (len(near) >= 19)
        if row.like:
            assert (row.n_random, row.random_rate) == (len(near), pytest.approx(float(np.median(near))))
    few = screen(lm, planted, make_ranking([PERSONA]), pairs, replace(CONFIG, screened=1, attributed=0, controls=12))
    assert few[0].n_random == 12 and not few[0].like and few[0].rate == 1
    told = f"as often as {PERSONA} (100.00% of the tokens, they {few[0].random_rate:.2%})"
    assert told in str(few) and "warning" not in str(found)


def test_controls_do_not_depend_on_how_many_latents_the_ranking_keeps(lm, planted, pairs, make_ranking, found):
    z = {PERSONA: 9, AGAINST: 8, SILENT: 7}
    more = [i for i in found.random.latents if i not in z][:8]
    longer = make_ranking([*z, *more], z=z | dict.fromkeys(more, 6))
    again = screen(lm, planted, longer, pairs, CONFIG)
    assert again.random == found.random
    assert [row.p_random for row in again] == [row.p_random for row in found]


def test_agreement_is_spearmans_over_what_was_run(lm, planted, found, pairs):
    held_out = sides_of(lm, split_pairs(pairs)[1], "pre")
    exact = {row.latent: row.effect.value for row in found}
    exact |= dict(zip(found.random.latents, found.random.effects, strict=True))
    latents, exact = list(exact), list(exact.values())
    named = {(a.estimate, a.split): a for a in found.agreement}
    assert len(named) == 6
    again = attribute(lm, planted, HOOK, held_out, integration=2)
    for name, values in (("gradient", again.effect), ("delta", -again.delta)):
        assert named[name, "held_out"].spearman.value == pytest.approx(spearmanr(values[latents], exact)[0], abs=0.02)
    best = named["gradient", "held_out"]
    assert best.spearman.low > 0 and best.same_sign > 0.6


def test_clamping_turns_the_expected_sign(lm, planted, pairs, make_ranking):
    units = torch.full((60,), 5.0)
    units[[PERSONA, AGAINST]] = 60.0
    units[40] = float("nan")  # never fired
    ranking = make_ranking([PERSONA, AGAINST], z={PERSONA: 9, AGAINST: -8})
    config = replace(CONFIG, strength=1.0, screened=2)
    found = screen(lm, planted, ranking, pairs, config, units=units)
    assert [row.verdict for row in found[:2]] == ["causal", "causal"]
    assert found[0].effect.low > 0 > found[1].effect.high
    assert np.isnan(found[0].integrated) and {a.estimate for a in found.agreement} == {"gradient", "delta"}
    assert "set to 1 x p99.9 at 'pre'" in str(found)


def test_positions_follow_the_rankings_pool(lm, planted, pairs, make_ranking):
    config = replace(CONFIG, positions=None, screened=1, attributed=0, controls=1, integration=0)
    for pool, positions in (("pre", "pre"), ("max", "answer")):
        found = screen(lm, planted, make_ranking([PERSONA], pool=pool), pairs, config)
        assert found.config["positions"] == positions
        assert found[0].verdict == "underpowered"


def test_what_numbers_add_up_to(make_ranking):
    good, weak = make_ranking([1])[0], make_ranking([1], p=0.3)[0]
    down, none = (-2, 0.01), (-0.1, 0.3)
    assert verdict(good, *down, -1, 0.01, 99) == "causal"
    assert verdict(good, *down, 1, 0.01, 99) == "opposite"
    assert verdict(good, *none, -1, 0.01, 99) == verdict(good, *down, -1, 0.2, 99) == "associated only"
    assert verdict(weak, *down, -1, 0.01, 99) == verdict(None, *down, 0, 0.01, 99) == "effect only"
    assert verdict(None, *none, 0, 0.01, 99) == "no"
    assert verdict(good, *down, -1, 0.01, 18) == "underpowered"


def test_saved_and_loaded_it_is_the_same(found, tmp_path):
    found.save(tmp_path / "formal.json")
    again = Screen.load(tmp_path / "formal.json")
    assert str(again) == str(found) and again.to_json() == found.to_json()
    assert again.random == found.random and again.config == found.config and again[0] == found[0]
    for broken, said in (
        ({}, "screen format None"),
        ({"format": 1}, "screen format 1, this version reads 2"),
        ({"format": 2}, "not a whole screen"),
    ):
        with pytest.raises(FormatError, match=said):
            Screen.from_json(broken)


def test_the_table_tells(found):
    text = str(found)
    assert "formal: latents ablated at 'pre'; estimates from 20 contrast pairs" in text
    assert "30 random latents" in text and "Spearman" in text and "output" in text


def test_bad_input(lm, planted, pairs, make_ranking):
    ranking = make_ranking([PERSONA, AGAINST])
    with pytest.raises(ConfigError, match="screened 20 is more than the 2 latents"):
        screen(lm, planted, ranking, pairs)
    few = ScreenConfig(screened=1)
    with pytest.raises(DataError, match="the ranking for formal is empty"):
        screen(lm, planted, make_ranking([]), pairs, few)
    with pytest.raises(DataError, match="names latent 900, this SAE has latents 0 to 59"):
        screen(lm, planted, make_ranking([900]), pairs, few)
    with pytest.raises(DataError, match="0 contrast pairs are in the held_out split"):
        screen(lm, planted, ranking, pairs[:20], few)
    with pytest.raises(ConfigError, match="give units"):
        screen(lm, planted, ranking, pairs, replace(few, strength=1.0))
    with pytest.raises(DataError, match="units are needed for 60 latents, got 3"):
        screen(lm, planted, ranking, pairs, replace(few, strength=1.0), units=torch.ones(3))
    with pytest.raises(ModelError, match=r"layers.99.resid_post does not exist"):
        screen(lm, planted, ranking, pairs, few, hook=HookPoint(99))


@pytest.mark.parametrize(
    "setting",
    [
        {"positions": "generated"},
        {"metric": "max"},
        {"strength": -1.0},
        {"strength": float("nan")},
        {"screened": 0},
        {"controls": -1},
        {"integration": -1},
        {"lm_batch": 0},
    ],
)
def test_settings_out_of_range(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ScreenConfig(**setting)


def test_config_is_inert():
    assert ScreenConfig(**asdict(CONFIG)) == CONFIG
