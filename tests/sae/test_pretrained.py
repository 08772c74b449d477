"""Releases of SAELens' registry, from a folder that stands in for the hub."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_persona.errors import FormatError, ModelError, RunError
from sae_persona.sae.formats import CONFIG, load_sae, save_sae
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU
from sae_persona.types import HookPoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # SAELens' dependencies warn as they are imported
    pytest.mark.filterwarnings("ignore:norm_scaling_factor not found"),
]
D_IN, N = 8, 40


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder whose SAEs ``planted`` lists: one with a known scale, one without."""
    from huggingface_hub.errors import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory

    entry = PretrainedSAELookup(
        release="planted",
        repo_id="nobody/planted",
        model="gpt2",
        conversion_func=None,
        saes_map={"layer-3": "three", "layer-4": "four"},
        expected_var_explained={},
        expected_l0={"layer-3": 12.5},
        neuronpedia_id={},
        norm_scaling_factor={"layer-3": 0.25},
        config_overrides=None,
    )

    def download(repo_id: str, filename: str, force_download: bool = False) -> str:
        if not (tmp_path / filename).is_file():
            raise EntryNotFoundError(f"no {filename} in {repo_id}")
        return str(tmp_path / filename)

    monkeypatch.setitem(get_pretrained_saes_directory(), "planted", entry)
    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    return tmp_path


def planted(folder: Path, **config) -> SAE:
    generator = torch.Generator().manual_seed(0)
    w_enc, w_dec, b_enc = (torch.randn(*s, generator=generator) for s in ((N, D_IN), (N, D_IN), (N,)))
    sae = SAE(w_enc, b_enc, torch.nn.functional.normalize(w_dec, dim=1), torch.ones(D_IN), ReLU())
    save_sae(sae, folder, metadata={"hook_name": "blocks.3.hook_resid_post"})
    text = (folder / CONFIG).read_text()
    for name, value in config.items():
        text = text.replace(f'"{name}": "none"', f'"{name}": "{value}"')
    (folder / CONFIG).write_text(text)
    return sae


def test_a_release_is_read_with_its_scale_folded(hub):
    there = planted(hub / "three", normalize_activations="expected_average_only_in")
    here, x = load_sae("planted", "layer-3"), torch.randn(30, D_IN)
    torch.testing.assert_close(here.predict(x), there.predict(x * 0.25) / 0.25, atol=1e-5, rtol=1e-5)
    assert here.hook == HookPoint(3) and here.metadata["l0"] == 12.5
    assert (here.metadata["release"], here.metadata["sae_id"]) == ("planted", "layer-3")


def test_a_repository_that_is_not_in_the_registry(hub):
    there, x = planted(hub / "some"), torch.randn(30, D_IN)
    torch.testing.assert_close(load_sae("somebody/saes", "some").predict(x), there.predict(x))


def test_a_scale_that_nobody_knows_is_refused(hub):
    planted(hub / "four", normalize_activations="expected_average_only_in")
    with pytest.raises(FormatError, match="not folded into the weights"):
        load_sae("planted", "layer-4")


def test_unknown_names_are_answered_with_the_nearest(hub):
    with pytest.raises(ModelError, match="no release 'plantd' in SAELens' registry: the nearest of .* are planted"):
        load_sae("plantd", "layer-3")
    with pytest.raises(ModelError, match="no SAE 'layer_3' in planted: the nearest of 2 are layer-3"):
        load_sae("planted", "layer_3")


@pytest.mark.parametrize("kind", ["LocalEntryNotFoundError", "OfflineModeIsEnabled"])
def test_a_hub_that_does_not_answer_is_one_line(kind, hub, monkeypatch):
    from huggingface_hub import errors
    from sae_lens.loading import pretrained_sae_loaders

    with pytest.raises(RunError, match="cannot fetch layer-3 of planted: no three/cfg.json"):
        load_sae("planted", "layer-3")

    def unreachable(**_) -> str:
        raise getattr(errors, kind)("cannot find the requested files\nin the cache")

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", unreachable)
    with pytest.raises(RunError, match="cannot find the requested files: check the connection") as caught:
        load_sae("planted", "layer-3")
    assert "\n" not in str(caught.value)


def test_what_saelens_cannot_read_is_a_format_error(hub):
    planted(hub / "three")
    save_file({"W_enc": torch.zeros(2, 2)}, hub / "three" / "sae_weights.safetensors")
    with pytest.raises(FormatError, match="SAELens cannot read layer-3 of planted") as caught:
        load_sae("planted", "layer-3")
    assert "\n" not in str(caught.value)
