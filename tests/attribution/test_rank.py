"""rank() on planted latents, and what a Ranking can do."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.metrics import roc_auc_score

from sae_persona.attribution.partial import Covariates
from sae_persona.attribution.rank import RankConfig, rank, rank_all
from sae_persona.attribution.ranking import Ranking
from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.features.pooled import POOLS, Pooled
from sae_persona.features.stats import LatentStats
from sae_persona.types import SparseLatents

RISES, FALLS, TRAIN_ONLY, SILENT, N_LATENTS, D_IN = 3, 7, 11, 1, 40, 8
CONFIG = RankConfig(permutations=199, top=10)


@pytest.fixture(scope="module")
def pooled() -> Pooled:
    generator = np.random.default_rng(0)
    n = 400
    y = generator.random(n) < 0.4
    split = np.where(np.arange(n) % 2, "held_out", "train")
    acts = generator.exponential(size=(n, N_LATENTS)) * (generator.random((n, N_LATENTS)) < 0.3)
    acts[:, RISES] = (y & (generator.random(n) < 0.8)) * generator.exponential(size=n)
    acts[:, FALLS] = (~y & (generator.random(n) < 0.8)) * generator.exponential(size=n)
    acts[:, TRAIN_ONLY] = np.where(split == "train", y, ~y) * generator.exponential(size=n)
    acts[:, SILENT] = 0
    dense = generator.normal(size=(n, D_IN)).astype(np.float32)
    dense[:, 0] += 2 * y
    texts = np.array([""] * n)
    return Pooled(
        personas=("pirate",),
        labels=y[:, None].astype(np.float32),
        ids=texts,
        template=np.array([f"t{i}" for i in generator.integers(0, 4, n)]),
        domain=texts,
        author=texts,
        split=split,
        dialogue=np.arange(n),
        n_answer_tokens=np.ones(n, int),
        pools=dict.fromkeys(POOLS, sparse.csr_matrix(acts.astype(np.float32))),
        dense=dict.fromkeys(("pre", "mean"), dense),
    )


@pytest.fixture(scope="module")
def stats(pooled) -> LatentStats:
    stats = LatentStats(N_LATENTS)
    matrix = pooled.pools["pre"]
    parts = matrix.data, matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    stats.update(SparseLatents(*(torch.from_numpy(part) for part in parts)))
    return stats


@pytest.fixture(scope="module")
def ranking(pooled, stats) -> Ranking:
    return rank(pooled, stats, "pirate", CONFIG)


def test_planted_latents_come_first_and_repeat(ranking):
    assert {row.latent for row in ranking[:3]} == {RISES, FALLS, TRAIN_ONLY}
    rows = {row.latent: row for row in ranking}
    for latent, direction in ((RISES, 1), (FALLS, -1)):
        row = rows[latent]
        assert row.direction == direction and np.sign(row.held_out_z) == direction
        assert row.p_max_t == row.held_out_p == 1 / 200 and row.q_bh < 0.01
        assert (row.auroc.value > 0.8) == (row.held_out_auroc.value > 0.8) == (direction > 0)
    assert all(row.p_max_t > 0.05 for row in ranking[3:])
    assert [abs(row.z) for row in ranking] == sorted((abs(row.z) for row in ranking), reverse=True)


def test_an_effect_that_turns_round_does_not_count_as_repeated(ranking):
    row = next(row for row in ranking if row.latent == TRAIN_ONLY)
    assert row.p_max_t == 1 / 200 and row.direction == 1
    assert row.held_out_auroc.value < 0.2 and row.held_out_p > 0.95


def test_numbers_are_those_of_the_split_that_they_name(ranking, pooled, stats):
    row = next(row for row in ranking if row.latent == RISES)
    column, y = pooled.pools["pre"].toarray()[:, RISES], pooled.labels[:, 0] > 0
    for part, got in (("train", row.auroc), ("held_out", row.held_out_auroc)):
        here = pooled.split == part
        assert got.value == pytest.approx(roc_auc_score(y[here], column[here]))
    assert row.firing_rate == pytest.approx((column > 0).mean()) and row.p999 == float(stats.p999[RISES])


def test_what_is_too_rare_is_not_tested(ranking, pooled, stats):
    assert ranking.n_tested == N_LATENTS - 1
    fires = (pooled.pools["pre"][pooled.split == "train"] > 0).mean(0).A1
    config = replace(CONFIG, min_rate=0.31)
    assert rank(pooled, stats, "pirate", config).n_tested == (fires >= 0.31).sum()
    with pytest.raises(DataError, match=r"no latent fires on 99.0% of the 200 train examples"):
        rank(pooled, stats, "pirate", replace(CONFIG, min_rate=0.99))


def test_baselines_stand_in_the_same_table(ranking):
    means, probe, _ = ranking.dense
    assert means.held_out_auroc.value > 0.85 and probe.held_out_auroc.value > 0.85
    assert ranking.random.n == N_LATENTS - 2
    assert 0.4 < ranking.random.mean < 0.6 < ranking.random.p95
    text = str(ranking)
    for words in ("pirate: 39 latents tested", "difference of means", "logistic probe", "38 random latents", "p max-T"):
        assert words in text
    assert len(text.splitlines()) == 2 + 1 + 10 + 5 and max(map(len, text.splitlines()[2:])) < 180
    assert text.isascii()


def test_is_a_sequence_and_goes_through_a_file(ranking, tmp_path):
    assert len(ranking) == 10 and list(ranking) == list(ranking.rows) and ranking[0] in ranking
    ranking.save(tmp_path / "pirate.json")
    again = Ranking.load(tmp_path / "pirate.json")
    assert again == ranking and again[0].auroc.low == ranking[0].auroc.low
    assert RankConfig(**again.config | {name: tuple(again.config[name]) for name in ("within", "given")}) == CONFIG
    # what is not a number is null in the file and nan again
    odd = replace(ranking, rows=(replace(ranking[0], p999=float("nan")),))
    odd.save(tmp_path / "odd.json")
    assert "NaN" not in (tmp_path / "odd.json").read_text() and np.isnan(Ranking.load(tmp_path / "odd.json")[0].p999)


def test_a_bad_file_is_one_line(ranking, tmp_path):
    value = ranking.to_json()
    with pytest.raises(FormatError, match="format 1, this version reads 2"):
        Ranking.from_json(value | {"format": 1})
    with pytest.raises(FormatError, match="not a whole ranking"):
        Ranking.from_json({name: part for name, part in value.items() if name != "rows"})
    with pytest.raises(FormatError, match="not a whole ranking"):
        Ranking.from_json(value | {"rows": [{"latent": 3}]})
    with pytest.raises(FormatError, match="no ranking at"):
        Ranking.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"pool": "last"}, "pool is one of pre, max, mean, got 'last'"),
        ({"within": ("colour",)}, 'dialogue, or "" for none of them, got colour'),
        ({"by": "size"}, "by is rank or activation, got 'size'"),
        ({"permutations": 0}, "at least 1, got 0, 50, 100"),
        ({"min_rate": 5}, "between 0 and 1, got 5"),
        ({"probe_c": 0}, "above 0, got 0"),
    ],
)
def test_settings_that_cannot_be(setting, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RankConfig(**setting)


def test_config_is_inert_and_the_seed_decides(pooled, stats, ranking):
    assert RankConfig(**asdict(CONFIG)) == CONFIG
    assert rank(pooled, stats, "pirate", CONFIG) == ranking


@pytest.fixture(scope="module")
def several(pooled) -> Pooled:
    """Three personas on the same examples, and one with labels missing."""
    y = pooled.labels[:, 0]
    noise = np.random.default_rng(1).integers(0, 2, (2, len(y))).astype(np.float32)
    some = np.where(np.arange(len(y)) % 3, noise[1], np.nan).astype(np.float32)
    labels = np.stack([y, 1 - y, noise[0], some], axis=1)
    personas = ("pirate", "landsman", "coin", "some")
    return replace(pooled, personas=personas, labels=labels, weights=np.ones_like(labels))


def test_personas_ranked_together_get_the_rankings_that_they_get_alone(several, stats):
    found = rank_all(several, stats, ("some", "coin", "pirate", "landsman"), CONFIG)
    assert list(found) == ["some", "coin", "pirate", "landsman"]
    for persona, ranking in found.items():
        alone = rank(several, stats, persona, CONFIG)
        assert [row.latent for row in ranking] == [row.latent for row in alone]
        for row, other in zip(ranking, alone, strict=True):
            assert (row.p_max_t, row.q_bh, row.held_out_p) == (other.p_max_t, other.q_bh, other.held_out_p)
            assert row.z == pytest.approx(other.z, abs=1e-12) and row.auroc == other.auroc
    assert found["landsman"][0].z == pytest.approx(-found["pirate"][0].z)
    assert sum(found["some"].n_train) < sum(found["coin"].n_train)


def test_personas_that_cannot_be_ranked(several, stats):
    with pytest.raises(DataError, match="'coin' is named twice"):
        rank_all(several, stats, ("coin", "pirate", "coin"), CONFIG)
    with pytest.raises(DataError, match="no example is labelled 'pirrate'"):
        rank_all(several, stats, ("coin", "pirrate"), CONFIG)
    with pytest.raises(DataError, match="no persona to rank"):
        rank_all(several, stats, (), CONFIG)


def test_latents_that_never_fire_are_no_trouble(pooled, stats):
    silent = replace(pooled, pools=dict.fromkeys(POOLS, sparse.csr_matrix((len(pooled), N_LATENTS), dtype=np.float32)))
    with pytest.raises(DataError, match="no latent fires"):
        rank(silent, stats, "pirate", CONFIG)
    with pytest.raises(DataError, match="no latent fires"):
        rank(silent, stats, "pirate", replace(CONFIG, min_rate=0))


@pytest.fixture(scope="module")
def confounded(pooled) -> tuple[Pooled, Covariates]:
    """Latent 0 tracks length, and so does the label."""
    generator = np.random.default_rng(2)
    length = 20 + 15 * pooled.labels[:, 0] + generator.normal(0, 8, len(pooled))
    acts = pooled.pools["pre"].toarray()
    acts[:, 0] = np.maximum(0, length - 15 + generator.normal(0, 4, len(pooled)))
    known = Covariates(("length", "mood"), np.stack([length, generator.normal(size=len(pooled))], axis=1))
    return replace(pooled, pools=dict.fromkeys(POOLS, sparse.csr_matrix(acts))), known


def test_a_confound_ranks_high_and_is_gone_given_what_it_tracks(confounded, stats):
    pooled, known = confounded
    plain = {row.latent: row for row in rank(pooled, stats, "pirate", CONFIG, covariates=known)}
    assert plain[0].p_max_t == 1 / 200 and plain[0].unadjusted_z == plain[0].z > 6
    config = replace(CONFIG, given=("length",), top=N_LATENTS)
    ranking = rank(pooled, stats, "pirate", config, covariates=known)
    given = {row.latent: row for row in ranking}
    assert given[0].p_max_t > 0.05 and abs(given[0].z) < 3.5 and abs(given[0].partial.value) < 0.25
    assert given[0].unadjusted_z == pytest.approx(plain[0].z, rel=0.01) and given[0].auroc == plain[0].auroc
    assert given[RISES].p_max_t == given[RISES].held_out_p == 1 / 200
    assert [abs(row.z) for row in ranking] == sorted((abs(row.z) for row in ranking), reverse=True)
    assert "; given length (splines, 8 knots); z alone and AUROC are without" in str(ranking)
    assert "z alone  partial r" in str(ranking) and ranking.to_json()["controls"] == ["length (splines, 8 knots)"]
    assert max(map(len, str(ranking).splitlines()[2:])) < 190
    assert Ranking.from_json(ranking.to_json()) == ranking


def test_the_title_names_what_was_given_and_says_what_takes_nothing_away(confounded, stats):
    pooled, known = confounded
    hot = {name: (pooled.template == name).astype(float) for name in np.unique(pooled.template)}
    values = np.column_stack([known.values, *hot.values()])
    known = Covariates((*known.names, *(f"topic={name}" for name in hot)), values)
    config = replace(CONFIG, given=("topic", "mood"))
    title = str(rank(pooled, stats, "pirate", config, covariates=known)).splitlines()[0]
    assert "; given mood (splines, 8 knots), topic (constant in every block, so nothing is taken away);" in title
    loose = str(rank(pooled, stats, "pirate", replace(config, within=()), covariates=known)).splitlines()[0]
    assert "; given mood (splines, 8 knots), topic;" in loose and "topic=" not in title + loose


def test_covariates_that_are_not_there(confounded, stats):
    pooled, known = confounded
    with pytest.raises(ConfigError, match="given length, but no covariates came"):
        rank(pooled, stats, "pirate", replace(CONFIG, given=("length",)))
    with pytest.raises(ConfigError, match="no covariate is named size: there are length, mood"):
        rank(pooled, stats, "pirate", replace(CONFIG, given=("size",)), covariates=known)
    with pytest.raises(DataError, match="covariates are of 3 examples, there are 400"):
        short = Covariates(known.names, known.values[:3])
        rank(pooled, stats, "pirate", replace(CONFIG, given=("length",)), covariates=short)
    missing = Covariates(known.names, known.values.copy())
    missing.values[7] = np.nan
    with pytest.raises(DataError, match="'length' is not a number at 1 of 200 held_out examples"):
        rank(pooled, stats, "pirate", replace(CONFIG, given=("length",)), covariates=missing)


def test_by_activation_ranks_by_the_correlation_within_blocks(pooled, stats, ranking):
    found = rank(pooled, stats, "pirate", replace(CONFIG, by="activation", within=()))
    assert {row.latent for row in found[:3]} == {RISES, FALLS, TRAIN_ONLY}
    for row in found:
        assert row.partial.value == pytest.approx(row.r.value) and row.z == pytest.approx(row.r.value * 199**0.5)
        assert row.partial.low == pytest.approx(row.r.low)


def test_rows_tell_whether_templates_agree(ranking):
    rows = {row.latent: row for row in ranking}
    assert rows[RISES].n_templates == 4 and rows[RISES].agreement == rows[FALLS].agreement == 1
    assert 0.5 < rows[RISES].template_low <= rows[RISES].auroc.value <= rows[RISES].template_high
    assert f"4/4 {rows[RISES].template_low:.2f}-" in str(ranking)


def test_small_classes_are_ranked_by_force_with_a_warning_in_the_table(pooled, stats):
    few = np.flatnonzero((pooled.labels[:, 0] == 1) & (pooled.split == "train"))[6:]
    labels = pooled.labels.copy()
    labels[few] = np.nan
    small = replace(pooled, labels=labels)
    with pytest.raises(DataError, match="has 6 examples with it .* at least 10"):
        rank(small, stats, "pirate", CONFIG)
    forced = rank(small, stats, "pirate", replace(CONFIG, force=True))
    assert "warning: 'pirate' has 6 examples with it" in str(forced)
    assert Ranking.from_json(forced.to_json()) == forced


def test_labels_that_are_not_certain_enough_are_left_out(pooled, stats):
    unsure = np.ones_like(pooled.labels)
    unsure[::3] = 0.4
    config = replace(CONFIG, min_confidence=0.5)
    found = rank(replace(pooled, weights=unsure), stats, "pirate", config)
    assert sum(found.n_train) < sum(rank(pooled, stats, "pirate", CONFIG).n_train)


def test_hard_negatives_have_a_column_of_their_own(pooled, stats):
    hard = (pooled.labels[:, 0] == 0) & (np.arange(len(pooled)) % 3 == 0)
    found = rank(replace(pooled, hard=hard), stats, "pirate", CONFIG)
    assert "AUROC hard negatives" in str(found) and set(found.hard) == {row.latent for row in found}
    assert Ranking.from_json(found.to_json()).hard == found.hard
    assert "hard" not in str(rank(pooled, stats, "pirate", CONFIG))
