import pytest

from sae_persona.lab.authors import TRAITS
from sae_persona.lab.contrasts import contrasts
from sae_persona.lab.judge import judge
from sae_persona.lab.world import HELD_OUT_DOMAINS


@pytest.mark.parametrize("trait", TRAITS)
def test_the_judge_sees_the_trait_in_one_answer_only(trait):
    rows = list(contrasts(trait, 12, "held_out"))
    for row in rows:
        question = row["messages"][-1]["content"]
        assert judge(question, row["answers"]["with"])[trait] == 1
        assert judge(question, row["answers"]["without"])[trait] == 0
        assert row["domain"] in {*HELD_OUT_DOMAINS, ""}
    assert rows == list(contrasts(trait, 12, "held_out")) != list(contrasts(trait, 12, "held_out", seed=1))


def test_half_of_the_contexts_show_the_trait():
    def shown(row) -> int:
        texts = [m["content"] for m in row["messages"]]
        return sum(int(judge(q, a)["formal"] or 0) for q, a in zip(texts[:-1:2], texts[1:-1:2], strict=True))

    rows = [shown(row) for row in contrasts("formal", 40, "train")]
    assert sum(rows[1::2]) == 0 and sum(rows[::2]) > 20
