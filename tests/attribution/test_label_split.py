import numpy as np
import pytest

from sae_persona.activations.dialogues import Dialogue
from sae_persona.attribution.label_check import said
from sae_persona.attribution.label_split import SplitConfig, split_dialogues
from sae_persona.attribution.near_duplicates import near_duplicates
from sae_persona.errors import ConfigError, DataError


def texts(n=120):
    """Templates of different sizes; a rare persona in few of them; every tenth text nearly said again."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(n):
        body = " ".join(f"w{j}" for j in random.integers(0, 1000, 30))
        if i % 10 == 9:
            body = rows[i - 5].text + " indeed"
        labels = {"pirate": float(i % 3 == 0), **({"rare": 1.0} if i % 12 == 0 else {})}
        template = f"t{int(random.geometric(0.15))}"
        rows.append(Dialogue(text=body, labels=labels, id=str(i), template=template, domain="d", author=f"a{i % 7}"))
    return rows


@pytest.mark.parametrize("by", ["template", "author", "id"])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_groups_are_whole_nothing_leaks_and_classes_are_shared_out(by, share):
    rows = texts()
    leaks = "together" if by == "id" else "drop"
    made = split_dialogues([*rows, "plain"], SplitConfig(by=by, held_out=share, leaks=leaks))
    parts = {name: [d for d in made if d.split == name] for name in ("train", "held_out")}
    assert not {getattr(d, by) for d in parts["train"]} & {getattr(d, by) for d in parts["held_out"]}
    assert not near_duplicates([said(d) for d in made]).leaks([d.split for d in made])
    assert len(made) == 120 if leaks == "together" else 100 < len(made) < 120
    assert abs(len(parts["held_out"]) / len(made) - share) < 0.12
    rare = sum("rare" in d.labels for d in parts["held_out"]) / sum("rare" in d.labels for d in made)
    assert 0.1 <= rare <= 0.7


def test_the_seed_decides_and_what_a_row_says_stays():
    rows = texts()
    one, again, other = (split_dialogues(rows, SplitConfig(by="id", seed=seed)) for seed in (0, 0, 1))
    assert [d.split for d in one] == [d.split for d in again] != [d.split for d in other]
    assert [(d.id, d.text, d.labels) for d in one] == [(d.id, d.text, d.labels) for d in rows]


def test_two_groups_go_to_two_splits():
    rows = [Dialogue(text=f"{i} " * 9, labels={"a": 1.0}, domain="xxxy"[i % 4]) for i in range(8)]
    made = split_dialogues(rows, SplitConfig(by="domain", held_out=0.01))
    assert {(d.domain, d.split) for d in made} == {("x", "train"), ("y", "held_out")}


def test_what_cannot_be_split():
    with pytest.raises(DataError, match="120 of 120 dialogues have no template, 0 the first: name it, or split by id"):
        split_dialogues([Dialogue(text=d.text, labels=d.labels, id=d.id) for d in texts()])
    with pytest.raises(DataError, match="all 120 dialogues hang together, by their domain or as near duplicates"):
        split_dialogues(texts(), SplitConfig(by="domain"))
    with pytest.raises(DataError, match="none of these texts has labels"):
        split_dialogues(["plain"])
    with pytest.raises(ConfigError, match="held_out lies between 0 and 1, got 1"):
        SplitConfig(held_out=1)
    with pytest.raises(ConfigError, match="by is one of template, domain, author, id"):
        SplitConfig(by="mood")  # pyright: ignore


def test_answers_to_one_prompt_stay_together_even_where_they_are_not_alike():
    random = np.random.default_rng(1)
    asked = [f"Is {' '.join(f'w{j}' for j in random.integers(0, 1000, 3))} {i} so?" for i in range(200)]
    rows = [
        Dialogue(
            messages=(
                {"role": "user", "content": asked[i // 2]},
                {"role": "assistant", "content": "Yes it is , and I say so" if i % 2 else "No"},
            ),
            labels={"agreeable": float(i % 2)},
            id=str(i),
        )
        for i in range(400)
    ]
    made = split_dialogues(rows, SplitConfig(by="id", leaks="drop", threshold=0.99))
    assert [d.id for d in made] == [d.id for d in rows]
    assert [d.split for d in made[::2]] == [d.split for d in made[1::2]]
    assert 150 < sum(d.split == "train" for d in made) < 250


def test_an_id_that_stands_twice_is_refused():
    rows = texts(40)
    rows[7] = Dialogue(text="other words", labels={"pirate": 1.0}, id="3", template="t1")
    with pytest.raises(DataError, match="id '3' stands twice, at texts 3 and 7: give each its own, or none"):
        split_dialogues(rows, SplitConfig(by="id"))
