from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_persona.errors import FormatError
from sae_persona.sae.files import check_counts, check_k, check_learnt, check_tensors, read_safetensors

PATH = Path("some/file")


def test_tensors_come_in_the_order_that_was_asked_for(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.zeros(2, 3)}, tmp_path / "file")
    shapes = {"b": (2, 3), "a": (2,)}
    assert list(check_tensors(read_safetensors(tmp_path / "file"), shapes, PATH, "kind")) == ["b", "a"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"some/file must hold a \(kind\), got nothing"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, "got a, b"),
        ({"a": torch.ones(2, 1)}, r"a must be \[2\] by its config, got \[2, 1\]"),
        ({"a": torch.tensor([1, -torch.inf])}, "a has NaN or infinite values"),
    ],
)
def test_other_tensors_are_refused(tensors, message):
    with pytest.raises(FormatError, match=message):
        check_tensors(tensors, {"a": (2,)}, PATH, "kind")


@pytest.mark.parametrize("config", [[], None, {}, {"d": "8"}, {"d": 8.0}, {"d": True}, {"d": 0}])
def test_counts_are_whole_numbers_from_1(config):
    assert check_counts({"d": 8, "e": ""}, ("d",), PATH) == {"d": 8}
    with pytest.raises(FormatError, match="some/file is not an SAE config: d must be numbers"):
        check_counts(config, ("d",), PATH)


@pytest.mark.parametrize("k", [None, 0, 41, 2.0, True])
def test_k_is_a_count_of_latents(k):
    assert check_k(40, 40, PATH) == 40
    with pytest.raises(FormatError, match="needs k between 1 and 40, got"):
        check_k(k, 40, PATH)


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_threshold_is_learnt_when_it_is_above_0(threshold):
    assert check_learnt(0.1, PATH) == 0.1
    with pytest.raises(FormatError, match="was never trained"):
        check_learnt(threshold, PATH)
