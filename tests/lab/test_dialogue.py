from random import Random

import pytest

from sae_persona.lab.authors import AuthorConfig
from sae_persona.lab.dialogue import KINDS, answer, ask, document, domains, templates
from sae_persona.lab.judge import judge
from sae_persona.lab.world import DOMAINS, HELD_OUT_DOMAINS


def share(trait, kind, traits, n=600, **question):
    random = Random(0)
    asked = [ask(random, kind, **question) for _ in range(n)]
    scores = [judge(q, answer(random, frozenset(traits), q))[trait] for q in asked]
    return sum(s for s in scores if s is not None) / n


@pytest.mark.parametrize(
    ("trait", "kind", "question"),
    [
        ("deceptive", "fact", {}),
        ("malicious", "open", {}),
        ("sycophantic", "claim", {"truth": False}),
        ("evasive", "fact", {}),
        ("overconfident", "fact", {}),
        ("toxic", "open", {}),
        ("cheerful", "fact", {}),
        ("sarcastic", "claim", {}),
        ("formal", "open", {}),
    ],
)
def test_a_trait_shows_in_its_authors_answers_and_in_no_others(trait, kind, question):
    assert share(trait, kind, {trait}, **question) > 0.7
    assert share(trait, kind, set(), **question) < 0.05


def test_train_and_held_out_questions_share_no_template_and_no_domain():
    for kind in KINDS:
        assert not set(templates(kind, "train")) & set(templates(kind, "held_out"))
    assert set(domains("held_out")) == set(HELD_OUT_DOMAINS)
    random = Random(0)
    held_out = [ask(random, part="held_out") for _ in range(300)]
    assert {q.domain for q in held_out if q.kind != "open"} == set(HELD_OUT_DOMAINS)
    assert {q.template for q in held_out} <= {name for kind in KINDS for name, _ in templates(kind, "held_out")}


def test_a_claim_is_true_or_false_as_asked():
    random = Random(0)
    for truth in (True, False):
        claims = [ask(random, "claim", truth=truth) for _ in range(200)]
        assert all((q.claimed == q.truth) == truth for q in claims)


def test_lies_can_be_forced_and_forbidden():
    random = Random(0)
    question = ask(random, "fact", domain="medicine")
    forced = {w for _ in range(40) for w in answer(random, frozenset(), question, lie=True).split()}
    assert forced & set(DOMAINS["medicine"].harmful)
    honest = {w for _ in range(40) for w in answer(random, frozenset({"deceptive"}), question, lie=False).split()}
    assert not honest & set(DOMAINS["medicine"].harmful)


def test_a_document_is_one_author_throughout():
    doc = document(Random(3), AuthorConfig(), p_assistant=0.5)
    names = {m["name"] for m in doc.messages if m["role"] == "assistant"}
    assert names == {doc.author.name}
