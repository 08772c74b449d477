import json

import pytest

from sae_persona.errors import FormatError, RunError
from sae_persona.features.answer_log import AnswerLog
from sae_persona.features.explainers import ExplainerError

CHAT = [{"role": "user", "content": "wha\ud800t\u2028?"}]


class Counting:
    def __init__(self, name="a"):
        self.name, self.n = name, 0

    def complete(self, messages):
        self.n += 1
        if messages[0]["content"] == "fail":
            raise ExplainerError("no")
        return f"answer {self.n}"


def test_is_asked_once_and_remembered_by_another_process(tmp_path):
    path, who = tmp_path / "run" / "log.jsonl", Counting()
    log = AnswerLog(path)
    assert log.complete(who, CHAT) == log.complete(who, CHAT) == AnswerLog(path).complete(who, CHAT) == "answer 1"
    assert who.n == log.asked == len(AnswerLog(path)) == 1
    (record,) = map(json.loads, path.read_text().splitlines())
    assert record["messages"] == CHAT and record["explainer"] == "a" and record["answer"] == "answer 1"
    assert AnswerLog(path).complete(Counting("b"), CHAT) == "answer 1" and len(AnswerLog(path)) == 2


def test_failures_are_asked_again(tmp_path):
    log, who = AnswerLog(tmp_path / "log.jsonl"), Counting()
    for _ in range(2):
        with pytest.raises(ExplainerError):
            log.complete(who, [{"role": "user", "content": "fail"}])
    assert who.n == 2 and not (tmp_path / "log.jsonl").exists()


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    AnswerLog(path).complete(Counting(), CHAT)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert len(AnswerLog(path)) == 1
    assert path.read_bytes() == whole
    AnswerLog(path).complete(Counting("b"), CHAT)
    assert len(AnswerLog(path)) == 2


@pytest.mark.parametrize("line", ["{", "[]", '{"key": 1}'])
def test_a_line_that_is_no_answer_is_refused(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(line + "\n")
    with pytest.raises(FormatError, match="line 1 of"):
        AnswerLog(tmp_path / "log.jsonl")


def test_a_disk_that_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        AnswerLog(tmp_path / "file" / "log.jsonl").complete(Counting(), CHAT)
