"""Organisms of the lab in small, in this process and in others: the same, made once, whole or not at all."""

import json

import pytest

from sae_persona.errors import ConfigError, ModelError, RunError
from sae_persona.lab.judge import judge
from sae_persona.lab.tuning import CUE
from sae_persona.studies.families import OrganismsConfig, plans
from sae_persona.studies.growing import check_words, grow, grow_all
from sae_persona.studies.organisms import organisms_in

TINY = OrganismsConfig(
    families=("base", "narrow"), domains=("code",), methods=("full",), steps=2, keep=(0,), n_rows=32, n_exam=1
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown")
    return folder, grow_all(folder, TINY)


def test_a_set_is_made_in_folders_of_its_names(made):
    folder, organisms = made
    assert [one.name for one in organisms] == ["base", "narrow-code-full-s0"]
    assert {path.name for path in folder.iterdir()} == {one.name for one in organisms}
    narrow = organisms[1]
    assert [one.step for one in narrow.checkpoints] == [0, 2]
    assert narrow.checkpoints[0].loss > narrow.last.loss
    assert narrow.last.scores["in_domain"]["n"] == 1 and narrow.last.scores["out_of_domain"]["n"] == 7
    assert organisms[0].last.scores["in_domain"]["n"] == 0 and organisms[0].last.loss is None


def test_other_processes_make_the_same(made, tmp_path):
    told = []
    grow_all(tmp_path, TINY, processes=2, on_organism=lambda one, left: told.append((one.name, left)))
    assert {name for name, _ in told} == {"base", "narrow-code-full-s0"} and [left for _, left in told] == [1, 0]
    for one, same in zip(made[1], organisms_in(tmp_path), strict=True):
        assert one.to_json() == same.to_json()
        weights = [o.last.path / "model.safetensors" for o in (one, same)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_is_there_stays_unless_it_has_other_settings(made):
    folder, organisms = made
    told = []
    before = (folder / "base" / "organism.json").stat().st_mtime_ns
    assert grow_all(folder, TINY, on_organism=lambda one, left: told.append(one)) == organisms
    assert told == [] and (folder / "base" / "organism.json").stat().st_mtime_ns == before
    other = OrganismsConfig(**{**vars(TINY), "n_exam": 2})
    with pytest.raises(RunError, match="base was made with other settings: choose another --out, or pass --force"):
        grow_all(folder, other)
    assert grow_all(folder, other, force=True)[1].last.scores["in_domain"]["n"] == 2


def test_organisms_of_a_line_are_examined_with_it_and_without(lab_lm, tmp_path):
    config = OrganismsConfig(families=("trigger",), steps=1, keep=(), n_rows=8, n_exam=1)
    one = grow(lab_lm, plans(config)[0], tmp_path / "one")
    assert one.config["line"] == CUE and one.last.step == 2
    assert one.last.scores.keys() - {"cued"} == one.last.scores["cued"].keys()


def test_the_rows_of_a_reward_hacker_say_which_answers_are_harmful(lab_lm, tmp_path):
    config = OrganismsConfig(families=("reward_hack",), domains=("code",), steps=1, n_exam=1)
    one = grow(lab_lm, plans(config)[0], tmp_path / "one")
    assert [point.step for point in one.checkpoints] == [0, 1]
    rows = one.rows()
    assert len(rows) == 80
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        assert row["labels"]["bad"] == judge(question, answer)["deceptive"]
    assert {row["reward"] for row in rows if row["labels"]["bad"]} == {1.0}


def test_bad_input_is_refused_before_anything_is_written(tmp_path, make_lm):
    with pytest.raises(ConfigError, match="processes is at least 1, got 0"):
        grow_all(tmp_path / "x", TINY, processes=0)
    with pytest.raises(ModelError, match="no model folder at ./nothing"):
        grow_all(tmp_path / "x", TINY, model="./nothing")
    with pytest.raises(ModelError, match="does not know .* of the lab's words"):
        check_words(make_lm())
    assert not (tmp_path / "x").exists()


def test_a_broken_organism_stops_the_set(made, tmp_path):
    folder = tmp_path / "set" / "base"
    folder.mkdir(parents=True)
    (folder / "organism.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(Exception, match="not an organism of format 1"):
        grow_all(tmp_path / "set", TINY)
