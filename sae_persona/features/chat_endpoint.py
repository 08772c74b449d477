"""A chat model behind an OpenAI-compatible endpoint: one POST a chat, tried again where that may help.

POST URL/chat/completions   {"model", "messages", "temperature": 0, "max_tokens"}
answer                      {"choices": [{"message": {"content": "..."}}]}
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from sae_persona.errors import ConfigError
from sae_persona.features.explainers import AskConfig, ExplainerError, Messages

KEY = "OPENAI_API_KEY"
LARGEST = 2**22
"""Bytes of an answer that are read."""
PATIENCE = 60.0
"""Seconds that an endpoint's Retry-After is followed at most."""


class _Again(Exception):
    """A failure that may pass: what it was, and how long the endpoint asked to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn the POST into a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ChatEndpoint:
    """A model at an OpenAI-compatible endpoint. The key, if the environment has one, is sent and never written."""

    def __init__(
        self, model: str, url: str, config: AskConfig | None = None, *, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError(f"an endpoint reads http://HOST[:PORT]/v1 or https://..., got {url!r}")
        self.model, self.url, self.config = model, url.rstrip("/"), config or AskConfig()
        self._sleep = sleep
        here = parts.hostname in ("127.0.0.1", "localhost", "::1")  # no proxy knows the way to this machine
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []), _NoRedirect())
        self._body: dict[str, Any] = {"temperature": 0, "max_tokens": self.config.answer_tokens}

    @property
    def name(self) -> str:
        return f"openai:{self.model}@{self.url}"

    def complete(self, messages: Messages) -> str:
        """The model's answer. ExplainerError after the last attempt, or at once where another cannot help."""
        for attempt in range(1, self.config.attempts + 1):
            try:
                return self._ask(messages)
            except _Again as error:
                if attempt == self.config.attempts:
                    raise ExplainerError(f"{error} ({attempt} attempts)") from error
                self._sleep(max(self.config.backoff * 2 ** (attempt - 1), error.wait))
        raise AssertionError("attempts are at least 1")

    def _ask(self, messages: Messages) -> str:
        try:
            return _content(self._post({"model": self.model, "messages": list(messages), **self._body}))
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(LARGEST).decode("utf-8", "replace")
            if error.code == 400 and self._adapt(said):
                return self._ask(messages)
            reason = f"status {error.code} from {self.url}: {_message(said)}"
            if error.code == 429 or error.code >= 500:
                raise _Again(reason, _seconds(error.headers.get("Retry-After"))) from error
            raise ExplainerError(reason) from error
        except TimeoutError as error:
            raise _Again(f"no answer from {self.url} in {self.config.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise _Again(f"no answer from {self.url} in {self.config.timeout:g} s") from error
            raise _Again(f"no whole answer from {self.url}: {str(reason) or type(reason).__name__}") from error

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        until = time.monotonic() + self.config.timeout
        with self._opener.open(request, timeout=self.config.timeout) as response:
            parts, size = [], 0
            # the socket's timeout is for each read: a server that drips must not hold a thread for ever
            while part := response.read1(65536):
                parts.append(part)
                size += len(part)
                if time.monotonic() > until:
                    raise TimeoutError
                if size > LARGEST:
                    raise ExplainerError(f"an answer of more than {LARGEST} bytes from {self.url}")
            if response.length:  # bytes that were promised and did not come
                raise http.client.IncompleteRead(b"".join(parts), response.length)
        return b"".join(parts)

    def _adapt(self, said: str) -> bool:
        """Newer models refuse two of the usual fields: leave out or rename what the error names. Whether it did."""
        try:
            field = json.loads(said)["error"]["param"]
        except (ValueError, KeyError, TypeError):
            return False
        if field not in ("temperature", "max_tokens") or field not in self._body:
            return False
        value = self._body[field]
        kept = {name: other for name, other in self._body.items() if name != field}
        self._body = {**kept, "max_completion_tokens": value} if field == "max_tokens" else kept
        return True


def _content(raw: bytes) -> str:
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        shown = raw[:60].decode("utf-8", "replace")
        raise ExplainerError(f"an answer that is no chat completion: {shown!r}") from error
    if not isinstance(content, str) or not content.strip():
        raise ExplainerError(f"an answer without text: {str(content)[:60]!r}")
    return content


def _message(said: str) -> str:
    try:
        said = json.loads(said)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        pass  # not every server writes errors as OpenAI does
    return " ".join(str(said).split())[:200]


def _seconds(retry_after: str | None) -> float:
    try:
        return min(max(float(retry_after or 0), 0.0), PATIENCE)
    except ValueError:  # a date
        return 0.0
