import math

import numpy as np
import pytest
from torch import zeros

from sae_persona.errors import ConfigError, FormatError
from sae_persona.steering.judges import load_judge
from sae_persona.steering.judges_chat import ChatJudge, Replies, mark_of
from sae_persona.steering.strength import Outcome


class Model:
    """Marks a text by what is in it, and counts."""

    def __init__(self):
        self.asked = 0

    def complete(self, messages):
        self.asked += 1
        words = messages[-1]["content"]
        text = words.split("TEXT\n")[1]
        if "gibberish" in text:
            return "I would rather not mark this."
        if words.startswith("Does the writer"):
            assert "speaks like a pirate" in words
            return f"Hm.\nMark: {2 if 'arr' in text else 0}"
        if "QUESTION" in words:
            assert "how are you" in words
            return "Mark: 1"
        return "**Mark: 2**"


def judge(model, **more):
    return ChatJudge(model, "m", {"pirate": "speaks like a pirate"}, **more)


def test_each_mark_is_asked_for_and_halved():
    assert judge(Model())("how are you", "arr") == {"pirate": 1.0, "instruction": 0.5, "fluency": 1.0, "valid": 1.0}
    assert judge(Model())("how are you", "well")["pirate"] == 0.0


def test_rubbish_is_unknown_and_counted():
    outcome = Outcome.of(judge(Model()), ["how are you"] * 3, ["arr", "gibberish", "well"], zeros(3, 2))
    assert outcome.unread == 1
    assert outcome.scores["pirate"][[0, 2]].tolist() == [1.0, 0.0]
    assert all(math.isnan(outcome.scores[what][1]) for what in ("pirate", "valid", "fluency"))
    score = outcome.steering_score("pirate")
    assert score[0] == pytest.approx(3 / (1 / 2 + 1 / 1 + 1 / 2)) and math.isnan(score[1]) and score[2] == 0
    assert np.isnan(outcome.scores["instruction"]).sum() == 1


def test_replies_are_asked_for_once_and_kept(tmp_path):
    model, path = Model(), tmp_path / "deep" / "replies.sqlite"
    first = judge(model, replies=Replies(path))
    first.ahead(["how are you"] * 4, ["arr", "arr", "well", "gibberish"])
    assert model.asked == 3 * 3 and first("how are you", "arr")["pirate"] == 1.0
    assert model.asked == 9
    again = judge(model, replies=Replies(path))
    assert again("how are you", "well")["pirate"] == 0.0 and model.asked == 9
    ChatJudge(model, "another", {}, replies=Replies(path)).ahead(["how are you"], ["well"])
    assert model.asked == 11
    path.write_text("not a data base, but long enough to be looked at as one")
    with pytest.raises(FormatError, match="not a file of replies"):
        Replies(path)


@pytest.mark.parametrize(
    ("reply", "mark"),
    [("Mark: 2", 2), ("so.\n\nmark = 1.", 1), ("**Mark: 0**", 0), ("2", 2), ("Mark: 1.0", 1), ("", None),
     ("Mark: 3", None), ("Mark: 12", None), ("Mark: 1.5", None), ("maybe 2", None),
     ("Mark: 2\nor perhaps not", None), ("7", None)],
)  # fmt: skip
def test_marks_are_read_strictly(reply, mark):
    assert mark_of(reply) == mark if mark is not None else math.isnan(mark_of(reply))


def test_a_chat_judge_has_a_name(tmp_path):
    loaded = load_judge("openai:org/m@http://127.0.0.1:1/v1", {"pirate": "pirate"}, tmp_path / "r.sqlite")
    assert isinstance(loaded, ChatJudge) and loaded.name == "openai:org/m@http://127.0.0.1:1/v1"
    with pytest.raises(ConfigError, match="at least one"):
        load_judge("openai:org/m@http://127.0.0.1:1/v1")
