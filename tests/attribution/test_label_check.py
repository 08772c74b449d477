import json

import pytest

from sae_persona.activations.dialogues import Dialogue
from sae_persona.attribution.label_check import CheckConfig, check_labels
from sae_persona.errors import ConfigError, DataError


def texts(n=48, **about):
    """Half with the persona, half without, half of each held out; no two alike."""
    return [
        Dialogue(
            text=f"text {i} says {i * 7} and {i * 13} or {i * 17}",
            **{
                "labels": {"pirate": float(i % 2)},
                "id": str(i),
                "split": ("train", "held_out")[i // 2 % 2],
                "template": f"t{i // 4}",
                "domain": "sea",
                **about,
            },
        )
        for i in range(n)
    ]


COARSE = CheckConfig(within=("domain",))


def test_labels_that_hold():
    found = check_labels([*texts(), "a plain text"], COARSE)
    assert found.holds and (found.n_texts, found.n_examples, found.n_unsplit) == (49, 48, 0)
    assert [(c.split, c.positive, c.negative, c.unlabelled) for c in found.classes] == [
        ("train", 12, 12, 0),
        ("held_out", 12, 12, 0),
    ]
    template = found.groups[0]
    assert (template.train, template.held_out, template.shared) == (12, 12, 12)
    assert "pirate  " in str(found) and json.loads(json.dumps(found.to_json()))["holds"] is True


def test_what_is_wrong_is_told():
    rows = texts(40)
    rows.append(Dialogue(text=rows[0].text.upper(), labels={"rude": 1.0}, id="0", split="held_out"))
    found = check_labels(rows, COARSE)
    assert not found.holds and found.duplicate_ids == ("0",)
    assert [(leak.held_out, leak.train, leak.similarity) for leak in found.leaks] == [("0", "0", 1.0)]
    problems = {(c.persona, c.split): c.problem for c in found.classes}
    assert problems[("pirate", "train")] == "" and "has 1 examples with it" in problems[("rude", "held_out")]
    assert "ids that stand twice: 1: 0" in str(found) and "1: 0 like 0 (1.00)" in str(found)
    few = {c.problem for c in check_labels(texts(32), COARSE).classes}
    assert all("has 8 examples with it and 8 without" in problem for problem in few)
    apart = check_labels([*texts()], CheckConfig(within=("template", "author", "dialogue")))
    assert "nothing can be permuted" in apart.classes[0].problem


def test_confidence_and_splits_by_id():
    rows = texts(80, split="", weights={"pirate": 0.5})
    found = check_labels(rows, COARSE)
    assert found.n_unsplit == 80 and {c.confidence for c in found.classes} == {0.5}
    sure = check_labels(rows, CheckConfig(within=(), min_confidence=0.6))
    assert "at a confidence of 0.6 or more" in sure.classes[0].problem


def test_nothing_labelled_and_settings_that_cannot_be():
    with pytest.raises(DataError, match="none of these 1 texts has labels"):
        check_labels(["a"])
    for wrong in ({"threshold": 2}, {"words": 0}, {"min_confidence": -1}, {"within": ("mood",)}):
        with pytest.raises(ConfigError):
            CheckConfig(**wrong)
