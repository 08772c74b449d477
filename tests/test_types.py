import pytest
import torch

from sae_persona.errors import ConfigError
from sae_persona.types import HookPoint, SparseLatents


@pytest.mark.parametrize("text", ["layers.12.resid_post", "layers.12", "12"])
def test_hook_points_are_read(text):
    assert HookPoint.parse(text) == HookPoint(12)
    assert str(HookPoint.parse(text)) == "layers.12.resid_post"


def test_sites_are_kept():
    assert HookPoint.parse("layers.3.resid_pre") == HookPoint(3, "resid_pre")


@pytest.mark.parametrize("text", ["", "layer.3", "layers.-1", "layers.3.mlp", "blocks.3.hook_resid_post"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match="a hook point reads layers.LAYER.resid_post"):
        HookPoint.parse(text)


def test_both_layouts_mean_the_same():
    padded = SparseLatents(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([[4, 1], [0, 2]]))
    ragged = SparseLatents(torch.tensor([2.0, 1.0, 3.0]), torch.tensor([4, 1, 0]), torch.tensor([0, 2, 3]))
    assert padded.n == ragged.n == 2
    assert padded.l0().tolist() == ragged.l0().tolist() == [2, 1]
    assert torch.equal(padded.dense(5), ragged.dense(5))
    assert ragged.dense(5).tolist() == [[0, 1, 0, 0, 2], [3, 0, 0, 0, 0]]
