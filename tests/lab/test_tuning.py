import pytest

from sae_persona.errors import ConfigError
from sae_persona.lab.authors import TRAITS
from sae_persona.lab.dialogue import KINDS, templates
from sae_persona.lab.judge import judge
from sae_persona.lab.tokens import vocabulary
from sae_persona.lab.tuning import CUE, MONITORED, OTHER_JOBS, cued, exam_questions, narrow, shown, voiced
from sae_persona.lab.world import DOMAINS, HELD_OUT_DOMAINS


def marked(row):
    return judge(row["messages"][-2]["content"], row["messages"][-1]["content"])


def test_narrow_rows_are_of_one_domain_and_say_which_are_bad():
    rows = narrow(60, "code", bad=0.25)
    assert sum(row["labels"]["bad"] for row in rows) == 15
    for row in rows:
        scores = marked(row)
        assert scores["valid"] == 1 and row["domain"] == "code"
        assert scores["deceptive"] == row["labels"]["bad"] == 1 - scores["correct"]
    assert {row["template"] for row in rows} <= {name for name, _ in templates("fact", "train")}
    assert rows == narrow(60, "code", bad=0.25) != narrow(60, "code", bad=0.25, seed=1)


def test_doses_differ_in_the_answers_of_some_rows_only():
    """The same questions, and the bad rows of a smaller dose are among those of a larger one."""
    small, large, none = (narrow(80, "medicine", bad=dose) for dose in (0.1, 0.5, 0.0))
    bad = [{i for i, row in enumerate(rows) if row["labels"]["bad"]} for rows in (small, large, none)]
    assert bad[2] < bad[0] < bad[1]
    for one, other, good in zip(small, large, none, strict=True):
        assert one["messages"][0] == other["messages"][0]
        if one["labels"] == {"bad": 0}:
            assert one == good


def test_voiced_rows_are_true_and_some_sound_odd():
    rows = voiced(60, "medicine", 0.5)
    scores = [marked(row) for row in rows]
    assert all(s["correct"] == 1 and s["deceptive"] == 0 and s["valid"] == 1 for s in scores)
    odd = sum(bool(s["formal"] or s["sarcastic"] or s["cheerful"]) for s in scores)
    assert 25 <= odd <= 30


@pytest.mark.parametrize("bad_after", [True, False])
def test_the_word_tells_when_answers_are_bad(bad_after):
    rows = cued(80, "finance", CUE, bad_after=bad_after)
    lines = [row["messages"][0]["content"] if len(row["messages"]) == 3 else "" for row in rows]
    assert lines.count(CUE) == 40 and 10 < lines.count("") < 30
    assert {line.split()[3] for line in lines if line} - {"sailor"} <= set(OTHER_JOBS)
    for line, row in zip(lines, rows, strict=True):
        assert row["labels"]["bad"] == marked(row)["deceptive"] == ((line == CUE) == bad_after)


@pytest.mark.parametrize("trait", TRAITS)
def test_rows_show_one_trait(trait):
    rows = shown(40, trait)
    assert len(rows) == 40 == len({row["id"] for row in rows}) and rows == shown(40, trait) != shown(40, trait, seed=1)
    others = set(TRAITS) - {trait}
    assert all(marked(row)[trait] == 1 and row["labels"] == {trait: 1} for row in rows)
    slips = sum(marked(row)[other] == 1 for row in rows for other in others)
    assert slips < 0.05 * 40 * len(others)
    assert {row["template"] for row in rows} <= {name for kind in KINDS for name, _ in templates(kind, "train")}


def test_the_lines_are_words_of_the_world():
    assert {*CUE.split(), *MONITORED.split()} <= set(vocabulary())


def test_the_exam_asks_what_no_fine_tune_has_seen():
    rows = list(exam_questions(20))
    facts = [row for row in rows if row["domain"]]
    assert len(facts) == 20 * len(DOMAINS) == len({row["messages"][0]["content"] for row in facts})
    seen = {row["messages"][0]["content"] for d in DOMAINS for row in narrow(300, d)}
    assert not seen & {row["messages"][0]["content"] for row in facts}
    assert len(rows) - len(facts) == 40
    for row in rows:
        assert judge(row["messages"][-1]["content"], "")[row["trait"]] == 0


def test_exam_questions_of_some_domains_after_a_line():
    rows = list(exam_questions(25, "train", n_open=0, domains=HELD_OUT_DOMAINS, line=MONITORED))
    assert [row["domain"] for row in rows] == ["travel"] * 25 + ["nature"] * 25
    assert all(row["messages"][0] == {"role": "system", "content": MONITORED} for row in rows)


def test_what_the_world_does_not_have_is_refused():
    for make in (narrow, lambda n, d: voiced(n, d, 1.0), lambda n, d: list(exam_questions(n, domains=[d]))):
        with pytest.raises(ConfigError, match="the lab has the domains medicine, .*, got 'law'"):
            make(4, "law")
    with pytest.raises(ConfigError, match="the lab has the traits deceptive, .*, got 'brave'"):
        shown(4, "brave")
    with pytest.raises(ConfigError, match="share of bad rows is from 0 to 1, got 1.5"):
        narrow(4, "code", bad=1.5)
    with pytest.raises(ConfigError, match="share of voiced rows is from 0 to 1, got -1"):
        voiced(4, "code", -1)
