"""Every prompt and answer of an explainer, kept: a run that is killed goes on without asking twice."""

import json
import time
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

from sae_persona.errors import FormatError, RunError
from sae_persona.features.explainers import Explainer, Messages


def answer_key(name: str, messages: Messages) -> str:
    """SHA-256 in hex of who is asked what."""
    return sha256(json.dumps([name, list(messages)]).encode()).hexdigest()


class AnswerLog:
    """Answers by prompt, in a JSONL file that grows by a line an answer.

        {"key": SHA-256, "explainer": NAME, "messages": [...], "answer": "...", "seconds": 1.2, "time": UNIX}

    A last line that was cut off by a kill is dropped. What failed is not kept: it is asked again.
    FormatError if another line is no such record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked = 0
        """Requests that went out."""
        self._lock = Lock()
        self._answers: dict[str, str] = {}
        if path.is_file():
            self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __len__(self) -> int:
        return len(self._answers)

    def complete(self, explainer: Explainer, messages: Messages) -> str:
        """The answer that was given before, else a new one, which is kept. Errors as the explainer's, uncaught."""
        key = answer_key(explainer.name, messages)
        with self._lock:
            if key in self._answers:
                return self._answers[key]
            self.asked += 1
        start = time.perf_counter()
        answer = explainer.complete(messages)
        record = {"key": key, "explainer": explainer.name, "messages": list(messages), "answer": answer}
        with self._lock:
            self._append({**record, "seconds": round(time.perf_counter() - start, 3), "time": round(time.time(), 3)})
            self._answers[key] = answer
        return answer

    def _append(self, record: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}. Free some space") from error

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole, cut = raw[: raw.rfind(b"\n") + 1], raw[raw.rfind(b"\n") + 1 :]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self._answers[record["key"]] = record["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise FormatError(f"line {number} of {self.path} is no answer: move the file away") from error
        if cut:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
