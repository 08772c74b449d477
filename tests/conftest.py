"""Kernel tests run on the GPU when there is one, else on the CPU in Triton's interpreter."""

import json
import os
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as each kernel is decorated, so before sae_kernels is imported
torch.set_num_threads(1)  # on small tensors, threads wait for each other longer than they work


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA: Triton's interpreter computes bf16 wrongly"))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh buffers start as NaN or -1, so an element that a kernel forgot to write shows."""

    def poisoned(make):
        def wrapped(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else -1)

        return wrapped

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory):
    """A run folder in which every stage has been run, in small. Copy it before you change it."""
    from sae_persona.demo import DemoConfig, demo
    from sae_persona.sae.recipe import TrainConfig

    config = DemoConfig(
        n_corpus=1000,
        n_quality=20,
        n_train=240,
        n_held_out=100,
        n_development=8,
        n_test=10,
        passes=12,
        training=TrainConfig(n_latents=256, k=8, lr=2e-3, steps=500),
        traits=("cheerful", "formal"),
    )
    said: list[str] = []
    run = demo(tmp_path_factory.mktemp("runs") / "demo", config, say=said.append)
    assert len(said) == 7, said
    return run


class ChatStub(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on 127.0.0.1. ``reply`` gets the last message's text and says what is done.

    str            a proper completion with that text
    int, or (int, headers, body)   that status
    bytes          200 with that body
    "<close>", "<cut>", "<hang>"   no answer at all, half an answer, an answer after the test is over
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ChatHandler)
        self.reply: Callable[[str], Any] = lambda text: "Fires on: stub"
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.over = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _ChatHandler(BaseHTTPRequestHandler):
    server: ChatStub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append({"path": self.path, **body})
        self.server.headers.append(dict(self.headers))
        done = self.server.reply(body["messages"][-1]["content"])
        if done == "<hang>":
            self.server.over.wait(20)
        if done in ("<hang>", "<close>"):
            return
        cut = done == "<cut>"
        if isinstance(done, str):
            done = 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": done}}]}).encode()
        status, headers, raw = (
            done if isinstance(done, tuple) else (done, {}, b"") if isinstance(done, int) else (200, {}, done)
        )
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2] if cut else raw)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def chat_stub():
    """A stub of a chat endpoint, for one test."""
    with ChatStub() as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def small_run(tmp_path):
    """A measured run of the lab with a small SAE of random directions, made in a second or two."""
    from sae_persona.activations.lm import load_lm
    from sae_persona.features.measure import MeasureConfig
    from sae_persona.lab import corpora
    from sae_persona.pipeline import measure_stage
    from sae_persona.runs import Run
    from sae_persona.sae.formats import hook_metadata, save_sae
    from sae_persona.sae.model import SAE
    from sae_persona.sae.sparsity import TopK
    from sae_persona.types import HookPoint

    lm, hook = load_lm("lab"), HookPoint(2)
    torch.manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(24, lm.d_model), dim=1)
    run = Run.create(tmp_path / "small")
    model = {"name": "lab", "config_hash": lm.config_hash, "blocks": lm.blocks_path}
    streaming = {"context_size": 128, "tokens": "all"}
    training = {"rule": "topk", "n_latents": 24, "k": 2, "hook": str(hook), "model": model}
    with run.recording("train", model=model, hook=str(hook), training=training, streaming=streaming):
        sae = SAE(w, torch.zeros(24), w, torch.zeros(lm.d_model), TopK(2))
        save_sae(sae, run.sae, metadata=hook_metadata(lm, hook))
    rows = [*corpora.labelled(30, "train")]
    measure_stage(run, lm, rows, config=MeasureConfig(context_size=128, contexts=8))
    return run
