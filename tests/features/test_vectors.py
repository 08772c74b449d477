import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_persona.errors import DataError, FormatError
from sae_persona.features.vectors import read_vector


def test_vectors_are_read(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    save_file({"v": torch.arange(3.0)[None].bfloat16()}, tmp_path / "a.safetensors")
    for name in ("a.npy", "a.safetensors"):
        assert read_vector(tmp_path / name).tolist() == [0, 1, 2]


def test_what_is_no_vector_is_refused(tmp_path):
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "matrix.npy", np.eye(2))
    (tmp_path / "text.npy").write_text("1 2 3")
    save_file({"v": torch.ones(2), "w": torch.ones(2)}, tmp_path / "two.safetensors")
    wanted = {
        "pickle.npy": "allow_pickle=False", "text.npy": "cannot read", "none.npy": "cannot read",
        "none.safetensors": "cannot read", "v.pt": "read from a .npy or .safetensors file",
    }  # fmt: skip
    for name, said in wanted.items():
        with pytest.raises(FormatError, match=said):
            read_vector(tmp_path / name)
    with pytest.raises(DataError, match=r"holds 2 tensors \(v, w\), wanted one"):
        read_vector(tmp_path / "two.safetensors")
    with pytest.raises(DataError, match=r"shape \[2, 2\], wanted a vector"):
        read_vector(tmp_path / "matrix.npy")
