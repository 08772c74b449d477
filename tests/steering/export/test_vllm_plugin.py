"""The plugin on a fake of the two surfaces of vLLM that it uses; with vLLM itself where it is installed."""

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from sae_persona.errors import ConfigError, ModelError
from sae_persona.steering.export import vllm_plugin
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Clamp, Pin, Placed, ProjectOut, Scale
from sae_persona.types import HookPoint

EAGER = SimpleNamespace(enforce_eager=True)


class Block(nn.Module):
    """A Hugging Face block that takes and gives what one of vLLM does: all tokens in a row, the stream in two parts."""

    def __init__(self, block, rotary):
        super().__init__()
        self.block, self.rotary = block, rotary

    def forward(self, positions, hidden_states, residual):
        x = hidden_states if residual is None else hidden_states + residual
        mask = torch.full((len(x), len(x)), -torch.inf).triu(1)[None, None]
        embedded = self.rotary(x[None], positions[None])
        out = self.block(x[None], attention_mask=mask, position_embeddings=embedded, position_ids=positions[None])[0]
        return out - x, x


class Model(nn.Module):
    """A Llama with such blocks, under the names that vLLM has for them."""

    def __init__(self, lm):
        super().__init__()
        inner = lm.model.model
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block(block, inner.rotary_emb) for block in inner.layers)
        self.embed, self.norm, self.head = inner.embed_tokens, inner.norm, lm.model.lm_head

    def forward(self, ids):
        positions, hidden, residual = torch.arange(len(ids)), self.embed(ids), None
        for i, block in enumerate(self.model.layers):
            # by place and by name, as its models do
            hidden, residual = block(positions, hidden, residual) if i % 2 else block(
                positions=positions, hidden_states=hidden, residual=residual
            )  # fmt: skip
        return self.head(self.norm(hidden + residual))


@pytest.fixture
def loader(lm, monkeypatch):
    """A fake vLLM in sys.modules: its loader, and one that overrides it."""

    class BaseModelLoader:
        def load_model(self, vllm_config, model_config, prefix=""):
            return Model(lm)

    class Other(BaseModelLoader):
        def load_model(self, vllm_config, model_config, prefix=""):
            return super().load_model(vllm_config, model_config, prefix=prefix)

    package = "vllm.model_executor.model_loader"
    for name in ("vllm", "vllm.model_executor", package, f"{package}.base_loader"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[f"{package}.base_loader"].BaseModelLoader = BaseModelLoader
    return SimpleNamespace(base=BaseModelLoader, other=Other)


@pytest.fixture
def made(lm, sae):
    u = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(6))
    edits = [
        Clamp(3, 2.0, 6.0),
        Scale(8, 2.0),
        Placed(edit=Pin(5, 1.0, 2.0), hook=HookPoint(2), positions="every"),
        Placed(edit=ProjectOut(u), hook=HookPoint(1, "resid_pre"), positions="every"),
        Placed(edit=ProjectOut(u), hook=HookPoint(0, "resid_pre"), positions="every"),
        Placed(edit=ProjectOut(u), hook=HookPoint(4), positions="every"),
    ]
    return Intervention.of(lm, sae, edits, positions="every")


def tokens(prompts):
    return torch.tensor([1, *prompts[0]][:16])


@torch.no_grad()
def test_what_vllm_loads_does_what_the_edits_do(lm, made, prompts, loader, tmp_path, monkeypatch):
    path = vllm_plugin.write(made, lm, tmp_path / "x.json")
    monkeypatch.setenv(vllm_plugin.VARIABLE, str(path))
    ids = tokens(prompts)
    plain = lm.model(ids[None]).logits[0]
    torch.testing.assert_close(Model(lm)(ids), plain, atol=1e-5, rtol=0)
    with made.applied(lm):
        wanted = lm.model(ids[None]).logits[0]
    assert (wanted - plain).abs().max() > 0.1
    vllm_plugin.register()
    vllm_plugin.register()  # vLLM may call it more than once in a process
    for kind in (loader.base, loader.other):
        torch.testing.assert_close(kind().load_model(None, EAGER)(ids), wanted, atol=1e-5, rtol=0)


def test_without_the_variable_nothing_is_changed(loader, monkeypatch):
    monkeypatch.delenv(vllm_plugin.VARIABLE, raising=False)
    before = loader.base.load_model
    vllm_plugin.register()
    assert loader.base.load_model is before


def test_compiled_models_are_refused(lm, made, loader, tmp_path, monkeypatch):
    monkeypatch.setenv(vllm_plugin.VARIABLE, str(vllm_plugin.write(made, lm, tmp_path / "x.json")))
    vllm_plugin.register()
    with pytest.raises(ConfigError, match="start vLLM with --enforce-eager"):
        loader.base().load_model(None, SimpleNamespace(enforce_eager=False))


def test_models_of_other_sizes_or_in_parts_are_refused(lm, made):
    model = Model(lm)
    model.model.layers = model.model.layers[:3]
    with pytest.raises(ModelError, match="is not the 5 blocks of lab"):
        vllm_plugin.install(model, made)
    with pytest.raises(ModelError, match="has no model.layers, where lab has its blocks"):
        vllm_plugin.install(nn.Linear(2, 2), made)
    model = Model(lm)
    model.model.layers[4] = type("PPMissingLayer", (nn.Identity,), {})()
    with pytest.raises(ModelError, match="block 4 is in another pipeline stage"):
        vllm_plugin.install(model, made)


def test_a_file_that_it_cannot_apply_is_refused_before_a_model_is_loaded(lm, sae, loader, tmp_path, monkeypatch):
    from sae_persona.steering.export import native

    native.export(tmp_path / "x.json", lm, sae, [Clamp(3, 2.0, 6.0)], positions="answer")
    monkeypatch.setenv(vllm_plugin.VARIABLE, str(tmp_path / "x.json"))
    with pytest.raises(ConfigError, match="the vLLM plugin edits every token"):
        vllm_plugin.register()


def test_the_package_names_it_to_vllm():
    found = [entry for entry in importlib.metadata.entry_points(group="vllm.general_plugins")]
    ours = [entry for entry in found if entry.name == "sae_persona"]
    if not ours:
        import tomllib
        from pathlib import Path

        project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
        value = project["entry-points"]["vllm.general_plugins"]["sae_persona"]
        ours = [importlib.metadata.EntryPoint("sae_persona", value, "vllm.general_plugins")]
    assert ours[0].load() is vllm_plugin.register


@pytest.mark.slow
def test_vllm_itself(lm, made, prompts, tmp_path, monkeypatch):
    vllm = pytest.importorskip("vllm")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setenv(vllm_plugin.VARIABLE, str(vllm_plugin.write(made, lm, tmp_path / "x.json")))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    llm = vllm.LLM(str(tmp_path / "model"), enforce_eager=True, dtype="float32", max_model_len=64)
    ids = tokens(prompts).tolist()
    settings = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=5)
    (out,) = llm.generate([{"prompt_token_ids": ids}], settings)
    with torch.no_grad(), made.applied(lm):
        wanted = lm.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    for token, found in out.outputs[0].logprobs[0].items():
        assert found.logprob == pytest.approx(float(wanted[token]), abs=1e-4)
