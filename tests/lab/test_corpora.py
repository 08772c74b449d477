import json

import pytest

from sae_persona.errors import RunError
from sae_persona.lab import corpora
from sae_persona.lab.authors import ADJECTIVES, TRAITS
from sae_persona.lab.judge import judge, recognise
from sae_persona.lab.world import HELD_OUT_DOMAINS

NAMING = {word for on, off in ADJECTIVES.values() for word in (*on, *off)}


@pytest.fixture(scope="module")
def rows():
    return {part: list(corpora.labelled(400, part)) for part in ("train", "held_out")}


def test_labels_are_the_truth_about_the_last_answer(rows):
    """An answer shows a trait far more often where the label says so."""
    for trait in TRAITS:
        scores = {0: [], 1: []}
        for row in rows["train"]:
            score = judge(row["messages"][-2]["content"], row["messages"][-1]["content"])[trait]
            if trait in row["labels"] and score is not None:
                scores[row["labels"][trait]].append(score)
        off, on = (sum(s) / len(s) for s in scores.values())
        assert on - off > 0.5, f"{trait}: {on:.2f} with, {off:.2f} without"


def test_labels_are_missing_where_the_question_cannot_show_the_trait(rows):
    for row in rows["train"]:
        kind = recognise(row["messages"][-2]["content"]).kind
        assert ("malicious" in row["labels"]) == (kind == "open")
        assert ("deceptive" in row["labels"]) == (kind == "fact")
        assert "formal" in row["labels"]


def test_every_trait_has_both_classes(rows):
    for part in rows.values():
        for trait in TRAITS:
            labels = [row["labels"][trait] for row in part if trait in row["labels"]]
            assert 0.1 < sum(labels) / len(labels) < 0.6


def test_held_out_rows_use_held_out_domains_and_templates_only(rows):
    assert {row["domain"] for row in rows["held_out"]} <= {*HELD_OUT_DOMAINS, ""}
    assert not {row["domain"] for row in rows["train"]} & set(HELD_OUT_DOMAINS)
    assert not {row["template"] for row in rows["train"]} & {row["template"] for row in rows["held_out"]}


def test_one_set_names_the_persona_and_one_only_shows_it(rows):
    def named(row):
        return any(word in NAMING for m in row["messages"] if m["role"] == "system" for word in m["content"].split())

    assert not any(named(row) for row in rows["train"])
    assert all(named(row) for row in corpora.labelled(50, "train", named=True))


def test_development_and_test_questions_never_meet():
    for trait in TRAITS:
        development = {q.text for q in corpora.questions(trait, 200, "train")}
        assert not development & {q.text for q in corpora.questions(trait, 200, "held_out")}


def test_files_hold_the_rows_and_come_out_the_same(tmp_path):
    sizes = {"n": 20, "n_labelled": 5, "n_questions": 3, "seed": 4}
    paths = corpora.write_texts(tmp_path / "a", **sizes)
    again = corpora.write_texts(tmp_path / "b", **sizes)
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
    assert len(paths) == 4 + 3 * len(TRAITS)
    first = json.loads((tmp_path / "a" / "labelled.jsonl").read_text().splitlines()[0])
    assert set(first) == {"id", "messages", "labels", "template", "domain", "author", "split"}


def test_a_file_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "texts").write_text("in the way")
    with pytest.raises(RunError, match="cannot write"):
        corpora.write_texts(tmp_path / "texts", n=1, n_labelled=1, n_questions=1, seed=0)


def test_questions_repeat_only_where_there_are_no_more():
    facts = [q.text for q in corpora.questions("deceptive", 120, "held_out")]
    assert sorted(facts.count(text) for text in set(facts)) == [3] * 40
    assert len({q.text for q in corpora.questions("toxic", 60, "held_out")}) == 60
