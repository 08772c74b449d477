"""ChatEndpoint against a local server that speaks the protocol, and misspeaks it."""

import json

import pytest

from sae_persona.errors import ConfigError
from sae_persona.features.chat_endpoint import ChatEndpoint
from sae_persona.features.explainers import AskConfig, ExplainerError

CHAT = [{"role": "user", "content": "what ?"}]


@pytest.fixture
def endpoint(chat_stub, monkeypatch):
    """Makes one that notes how long it would have slept."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def make(**settings):
        slept = []
        made = ChatEndpoint("m", chat_stub.url, AskConfig(**settings), sleep=slept.append)
        made.slept = slept
        return made

    return make


def in_turn(*replies):
    left = list(replies)
    return lambda text: left.pop(0)


def test_asks_as_the_protocol_says(chat_stub, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    chat_stub.reply = lambda text: f"you said {text}"
    assert endpoint(answer_tokens=7).complete(CHAT) == "you said what ?"
    assert chat_stub.bodies == [
        {"path": "/v1/chat/completions", "model": "m", "messages": CHAT, "temperature": 0, "max_tokens": 7}
    ]
    assert chat_stub.headers[0]["Authorization"] == "Bearer secret"
    monkeypatch.delenv("OPENAI_API_KEY")
    endpoint().complete(CHAT)
    assert "Authorization" not in chat_stub.headers[1]


def test_waits_longer_each_time_and_as_long_as_it_is_told(chat_stub, endpoint):
    chat_stub.reply = in_turn(429, 503, (429, {"Retry-After": "30"}, b"{}"), (500, {"Retry-After": "9999"}, b""), "ok")
    made = endpoint(attempts=5, backoff=0.5)
    assert made.complete(CHAT) == "ok"
    assert made.slept == [0.5, 1.0, 30.0, 60.0]


@pytest.mark.parametrize("failure", [429, 500, "<close>", "<cut>", "<hang>"], ids=str)
def test_failures_that_may_pass_are_tried_again_and_then_told(chat_stub, endpoint, failure):
    chat_stub.reply = in_turn(failure, "at last")
    assert endpoint(timeout=0.3).complete(CHAT) == "at last"
    chat_stub.reply = lambda text: failure
    with pytest.raises(ExplainerError, match=r"(status|no answer|no whole answer).* \(2 attempts\)"):
        endpoint(timeout=0.3, attempts=2).complete(CHAT)


def test_a_server_that_drips_does_not_hold_the_run(chat_stub, endpoint):
    """Each read comes in time, the whole does not."""
    import time

    def drip(text):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n")
        for _ in range(30):
            handler.wfile.write(b" ")
            time.sleep(0.05)
        return "<close>"

    handler = None
    plain = chat_stub.RequestHandlerClass

    class Dripping(plain):
        def do_POST(self):
            nonlocal handler
            handler = self
            super().do_POST()

        def finish(self):
            try:
                super().finish()
            except OSError:
                pass  # the client has gone

    chat_stub.RequestHandlerClass, chat_stub.reply = Dripping, drip
    chat_stub.handle_error = lambda *_: None
    start = time.perf_counter()
    with pytest.raises(ExplainerError, match=r"no answer from .* in 0.3 s"):
        endpoint(timeout=0.3, attempts=1).complete(CHAT)
    assert time.perf_counter() - start < 1.2


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (401, "status 401"),
        ((404, {}, b'{"error": {"message": "no such\\nmodel"}}'), "status 404 from .*: no such model"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), "status 302"),
        (b"<html>hello", "no chat completion: '<html>hello'"),
        (b'{"choices": []}', "no chat completion"),
        (b'["x"]', "no chat completion"),
        (b'{"choices": [{"message": {"content": null}}]}', "without text: 'None'"),
        ("  ", "without text"),
    ],
)
def test_failures_that_will_not_pass_are_told_at_once(chat_stub, endpoint, reply, told):
    chat_stub.reply = lambda text: reply
    with pytest.raises(ExplainerError, match=told):
        endpoint().complete(CHAT)
    assert len(chat_stub.bodies) == 1


def test_fields_that_a_model_refuses_are_changed_for_good(chat_stub, endpoint):
    def picky(text):
        body = chat_stub.bodies[-1]
        for field in ("max_tokens", "temperature"):
            if field in body:
                return 400, {}, json.dumps({"error": {"message": "no", "param": field}}).encode()
        return "fine"

    chat_stub.reply = picky
    made = endpoint(answer_tokens=9)
    assert made.complete(CHAT) == made.complete(CHAT) == "fine"
    assert chat_stub.bodies[-1] == {
        "path": "/v1/chat/completions", "model": "m", "messages": CHAT, "max_completion_tokens": 9
    }  # fmt: skip
    assert len(chat_stub.bodies) == 4
    chat_stub.reply = lambda text: (400, {}, b'{"error": {"message": "no", "param": "messages"}}')
    with pytest.raises(ExplainerError, match="status 400"):
        made.complete(CHAT)


def test_nobody_there():
    made = ChatEndpoint("m", "http://127.0.0.1:9/v1", AskConfig(attempts=2, timeout=2), sleep=lambda s: None)
    with pytest.raises(ExplainerError, match=r"no whole answer from .*refused.* \(2 attempts\)"):
        made.complete(CHAT)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x/v1", "file:///etc/passwd", "http://", "http://me:pw@x/v1"])
def test_what_is_no_endpoint_is_refused(url):
    with pytest.raises(ConfigError, match="an endpoint reads http"):
        ChatEndpoint("m", url)
