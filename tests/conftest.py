"""Kernel tests run on the GPU when there is one, else on the CPU in Triton's interpreter."""

import os

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
