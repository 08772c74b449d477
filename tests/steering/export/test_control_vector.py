import json

import gguf
import numpy as np
import pytest
import torch

from sae_persona.errors import ConfigError, FormatError
from sae_persona.steering.export import control_vector
from sae_persona.steering.export.approximate import approximate


def added_after(lm, vectors):
    """Hooks that add a vector to a block's output: what llama.cpp does with ``direction.N``."""
    tensors = {n: torch.from_numpy(v) for n, v in vectors.items()}
    return [lm.blocks[n].register_forward_hook(lambda _, args, out, v=v: out + v) for n, v in tensors.items()]


def test_what_llama_cpp_would_add_is_what_the_edits_do(lm, sums, edited, logits, tmp_path):
    reader = gguf.GGUFReader(control_vector.write(sums, lm, tmp_path / "x.gguf"))
    found = {int(t.name.removeprefix("direction.")): np.array(t.data) for t in reader.tensors}
    assert set(found) == {2, 3}
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 and list(t.shape) == [lm.d_model] for t in reader.tensors)
    handles = added_after(lm, found)
    try:
        got = logits(lm)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(got, edited(lm, sums), atol=1e-5, rtol=0)


def test_its_keys_are_those_that_readers_ask_for(lm, sums, tmp_path):
    reader = gguf.GGUFReader(control_vector.write(sums, lm, tmp_path / "x.gguf"))

    def key(name):
        return reader.get_field(name).contents()

    assert (key("general.architecture"), key("controlvector.model_hint")) == ("controlvector", "llama")
    assert (key("controlvector.layer_count"), key("sae_persona.config_hash")) == (2, lm.config_hash)


def test_what_is_lost_stands_in_the_file(lm, sums, prompts, tmp_path):
    made = approximate(sums, lm, prompts[:2], prompts[2:4])
    reader = gguf.GGUFReader(control_vector.write(made, lm, tmp_path / "x.gguf"))
    assert json.loads(reader.get_field("sae_persona.approximation").contents()) == made.approximation


def test_other_files_are_refused(lm, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF but not really" * 20)
    with pytest.raises(FormatError, match="is not a GGUF file"):
        control_vector.read(path)

    def written(architecture, name, x):
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_tensor(name, x)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    for arguments, message in (
        (("llama", "direction.1", np.ones(4, np.float32)), "of architecture llama, not controlvector"),
        (("controlvector", "other", np.ones(4, np.float32)), "holds F32 direction.N, got other"),
        (("controlvector", "direction.1", np.ones(4, np.float16)), "holds F32 direction.N, got direction.1"),
        (("controlvector", "direction.1", np.full(4, np.nan, np.float32)), "not all of them finite"),
    ):
        written(*arguments)
        with pytest.raises(FormatError, match=message):
            control_vector.read(path)


def test_without_gguf_it_says_what_to_install(lm, sums, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'sae-persona\[export\]'"):
        control_vector.write(sums, lm, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
