"""A language model behind an OpenAI-compatible HTTP interface, asked for one reply at a time."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from sae_persona.errors import ConfigError, RunError

KEY = "OPENAI_API_KEY"
"""Environment variable of the key that is sent; without it none is."""
PASSING = frozenset({408, 409, 429, 500, 502, 503, 504})
"""HTTP statuses that may pass."""


@dataclass(frozen=True, kw_only=True)
class ChatEndpoint:
    """Where a chat model is, and how it is asked.

    ConfigError for a URL that is not http or https.
    """

    model: str
    url: str
    """Of the interface, such as http://127.0.0.1:8000/v1: /chat/completions goes behind it."""
    max_tokens: int = 256
    timeout: float = 60.0
    """Seconds for one reply."""
    retries: int = 3
    """Further tries where the server is busy or silent."""
    wait: float = 1.0
    """Seconds before the first of them, doubled each time."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not self.model:
            raise ConfigError(f"a chat model reads MODEL@http(s)://HOST/v1, got {self.model}@{self.url}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``MODEL@URL``. ConfigError on anything else."""
        model, _, url = text.partition("@")
        return cls(model=model, url=url.rstrip("/"))

    def complete(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The reply to a chat, greedily decoded. RunError if the server refuses, stays silent or talks nonsense."""
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            try:
                with urlopen(request, timeout=self.timeout) as reply:
                    return self._content(reply.read())
            except HTTPError as error:
                problem, may_pass = f"HTTP status {error.code}", error.code in PASSING
                error.close()
            except (URLError, TimeoutError, ConnectionError) as error:
                problem, may_pass = str(getattr(error, "reason", error)), True
            if not may_pass or attempt == self.retries:
                hint = f": is {KEY} set?" if "401" in problem or "403" in problem else ""
                raise RunError(f"no reply of {self.model} at {self.url} ({problem}){hint}")
            time.sleep(self.wait * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _content(self, raw: bytes) -> str:
        try:
            reply: Any = json.loads(raw)
            content = reply["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise RunError(f"{self.url} does not talk as an OpenAI-compatible server: {raw[:80]!r}") from error
        return content if isinstance(content, str) else ""
