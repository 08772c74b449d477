import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from sae_persona.errors import ConfigError, RunError
from sae_persona.steering.chat import ChatEndpoint


@pytest.fixture
def server():
    """A server on this machine whose replies (status, body) the test writes; it keeps what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.asked.append((self.path, self.headers["Authorization"], body))
            status, text = stub.reply(body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    class Stub:
        asked: list
        reply: Callable
        url: str

    stub = Stub()
    stub.asked, stub.reply = [], lambda body: (200, said("Mark: 2"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        stub.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield stub
        http.shutdown()


def said(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


CHAT = [{"role": "user", "content": "hi"}]


def test_asks_as_the_interface_wants(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    endpoint = ChatEndpoint.parse(f"org/some-model@{server.url}/")
    assert endpoint.complete(CHAT) == "Mark: 2"
    path, key, body = server.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["messages"], body["temperature"]) == ("org/some-model", CHAT, 0)
    monkeypatch.delenv("OPENAI_API_KEY")
    endpoint.complete(CHAT)
    assert server.asked[1][1] is None


def test_a_busy_server_is_asked_again(server):
    statuses = iter([429, 503, 200])
    server.reply = lambda body: (next(statuses), said("yes"))
    assert ChatEndpoint(model="m", url=server.url, wait=0.0).complete(CHAT) == "yes"
    assert len(server.asked) == 3


def test_what_does_not_reply_is_an_error(server):
    endpoint = ChatEndpoint(model="m", url=server.url, wait=0.0, retries=1)
    server.reply = lambda body: (401, "no")
    with pytest.raises(RunError, match="HTTP status 401.*is OPENAI_API_KEY set"):
        endpoint.complete(CHAT)
    assert len(server.asked) == 1, "a refusal does not pass"
    server.reply = lambda body: (500, "no")
    with pytest.raises(RunError, match="HTTP status 500"):
        endpoint.complete(CHAT)
    assert len(server.asked) == 3
    server.reply = lambda body: (200, '{"choices": []}')
    with pytest.raises(RunError, match="does not talk as an OpenAI-compatible server"):
        endpoint.complete(CHAT)
    with pytest.raises(RunError, match="refused"):
        ChatEndpoint(model="m", url="http://127.0.0.1:9/v1", wait=0.0, retries=0).complete(CHAT)


@pytest.mark.parametrize("text", ["m", "m@", "@http://x/v1", "m@file:///etc/passwd", "m@ftp://x"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="MODEL@http"):
        ChatEndpoint.parse(text)
