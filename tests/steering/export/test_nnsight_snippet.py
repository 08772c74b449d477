"""The snippet under a fake of nnsight, whose body runs beside the forward pass; with nnsight where it is installed."""

import importlib.util
import queue
import threading

import pytest
import torch

from sae_persona.errors import ConfigError
from sae_persona.steering.export import nnsight_snippet
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Ceiling, Clamp, Placed, ProjectOut
from sae_persona.types import HookPoint


class Saved(torch.Tensor):
    def save(self):
        return self.as_subclass(torch.Tensor)


class Envoy:
    """A module whose output the body of a trace reads and replaces, in the order of the forward pass."""

    def __init__(self, model, module):
        self.__dict__.update(_model=model, _module=module)

    def __getattr__(self, name):
        return Envoy(self._model, getattr(self._module, name))

    def __getitem__(self, i):
        return Envoy(self._model, self._module[i])

    @property
    def output(self):
        return self._model.reach(self._module).as_subclass(Saved)

    def __setattr__(self, name, value):
        assert name == "output"
        self._model.now = value.as_subclass(torch.Tensor)


class Traced(Envoy):
    """A fake LanguageModel: `with model.trace(...)` starts a thread that waits at each module the body asks for."""

    def __init__(self, lm):
        self.__dict__.update(_model=self, _module=lm.model, now=None, arrived=queue.Queue(), go_on=queue.Queue())

    def __setattr__(self, name, value):
        self.__dict__[name] = value

    def reach(self, module):
        while self.__dict__.get("at") is not module:
            if self.__dict__.get("at") is not None:
                self.go_on.put(self.now)
            self.at, self.now = self.arrived.get(timeout=20)
        return self.now

    def trace(self, ids):
        self.ids, self.at = ids, None
        return self

    def __enter__(self):
        def wait(module, args, out):
            self.arrived.put((module, out))
            return self.go_on.get(timeout=20)

        watched = [*self._module.model.layers, self._module.lm_head]
        self.handles = [module.register_forward_hook(wait) for module in watched]
        self.thread = threading.Thread(target=lambda: torch.no_grad()(self._module)(self.ids))
        self.thread.start()

    def __exit__(self, *_):
        self.go_on.put(self.now)
        self.thread.join(timeout=20)
        for handle in self.handles:
            handle.remove()


def snippet(path):
    spec = importlib.util.spec_from_file_location("snippet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(lm, sae):
    u = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(8))
    there = Placed(edit=ProjectOut(u), hook=HookPoint(4), positions="every")
    before = Placed(edit=ProjectOut(u), hook=HookPoint(1, "resid_pre"), positions="every")
    return Intervention.of(lm, sae, [Clamp(3, 2.0, 6.0), Ceiling(8, 0.1, 1.0), there, before], positions="every")


@torch.no_grad()
def test_the_snippet_does_what_the_edits_do(lm, made, prompts, tmp_path):
    ids = torch.tensor([prompts[0]])
    found = snippet(nnsight_snippet.write(made, lm, tmp_path / "x.py")).steered(Traced(lm), ids)
    plain = lm.model(ids).logits
    with made.applied(lm):
        wanted = lm.model(ids).logits
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_priorities_are_refused(lm, sae, tmp_path):
    edits = [Placed(edit=Clamp(3, 2.0, 6.0), positions="every", priority=i) for i in (0, 1)]
    with pytest.raises(ConfigError, match="knows no priorities"):
        nnsight_snippet.write(Intervention.of(lm, sae, edits), lm, tmp_path / "x.py")
    assert not list(tmp_path.iterdir())


def test_nnsight_itself_agrees(lm, made, prompts, tmp_path):
    nnsight = pytest.importorskip("nnsight")
    ids = torch.tensor([prompts[0]])
    model = nnsight.LanguageModel(lm.model, tokenizer=lm.tokenizer)
    found = snippet(nnsight_snippet.write(made, lm, tmp_path / "x.py")).steered(model, ids)
    with torch.no_grad(), made.applied(lm):
        wanted = lm.model(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
