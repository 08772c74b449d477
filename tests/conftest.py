"""Kernel tests run on the GPU when there is one, else in Triton's interpreter. Tiny random models of each family."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as each kernel is decorated, so before sae_kernels is imported
torch.set_num_threads(1)  # on small tensors, threads wait for each other longer than they work

SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES = {
    "Llama": {},
    "GPT2": {},
    "GPTNeoX": {},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "Phi": {},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 3},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 8},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8},
    "GPTJ": {"rotary_dim": 4},  # its blocks return tuples
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['name'] if 'name' in m else m['role'] }}>{{ m['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


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
    from sae_persona.studies.finetune import FinetuneConfig
    from sae_persona.studies.lab_case import SMALL

    config = DemoConfig(
        n_corpus=1000,
        n_quality=20,
        n_train=240,
        n_held_out=100,
        n_development=8,
        n_test=10,
        passes=12,
        n_exam=2,
        tuning=FinetuneConfig(steps=30, keep=()),
        reversal=replace(
            SMALL, n_up=1, n_random=1, further_steps=2, induce=None, search=replace(SMALL.search, strengths=(1.5,))
        ),
        training=TrainConfig(n_latents=256, k=8, lr=2e-3, steps=500),
        traits=("cheerful", "formal"),
    )
    said: list[str] = []
    run = demo(tmp_path_factory.mktemp("runs") / "demo", config, say=said.append)
    assert len(said) == 10, said
    return run


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process; returns exit status, stdout, stderr."""
    from sae_persona import cli

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["sae-persona", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
            sys.exit(0)
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return called


# ---- language models


def byte_tokenizer(*, bos: bool = True, sets_bos: bool = True, template: str | None = TEMPLATE):
    """One token a byte, after <pad>, <s> and </s>. It may have a BOS, and may set it before a plain text or not."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos and sets_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
    )


def random_lm(family: str, tokenizer):
    import transformers

    from sae_persona.activations.lm import wrap_lm

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **FAMILIES[family])
    return wrap_lm(transformers.AutoModelForCausalLM.from_config(config), tokenizer, name=f"tiny-{family}")


@pytest.fixture
def small_sizes() -> dict:
    """Of the tiny models' configs."""
    return dict(SMALL)


@pytest.fixture
def make_tokenizer():
    return byte_tokenizer


@pytest.fixture(params=FAMILIES)
def any_lm(request):
    """One of each family."""
    return random_lm(request.param, byte_tokenizer())


@pytest.fixture
def make_lm():
    """Any family by name, with any tokenizer."""
    return lambda family="Llama", **tokenizer: random_lm(family, byte_tokenizer(**tokenizer))


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
    from sae_persona.runs import Run
    from sae_persona.sae.formats import hook_metadata, save_sae
    from sae_persona.sae.model import SAE
    from sae_persona.sae.sparsity import TopK
    from sae_persona.stages.pipeline import measure_stage
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
