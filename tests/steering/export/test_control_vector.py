import ctypes
import json
from contextlib import nullcontext

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


def llama_file(lm, path):
    """The model as llama.cpp reads it, in fp32: query and key rows interleaved for its rotary order."""
    config, weights = lm.model.config, lm.model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    names += [f"t{i}" for i in range(len(names), config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * len(names))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(names) - 259))

    def interleaved(w):
        heads = config.num_attention_heads
        return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", weights["lm_head.weight"].numpy())
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    for i in range(config.num_hidden_layers):
        for theirs, here in parts.items():
            w = weights[f"model.layers.{i}.{theirs}.weight"].numpy()
            w = interleaved(w) if here in ("attn_q", "attn_k") else w
            writer.add_tensor(f"blk.{i}.{here}.weight", np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama_cpp_itself_agrees(lm, sums, prompts, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    ids = [1, *prompts[0]][:16]
    model = str(llama_file(lm, tmp_path / "model.gguf"))
    llm = llama_cpp.Llama(model, n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
    vectors = control_vector.read(control_vector.write(sums, lm, tmp_path / "x.gguf"))
    zero = torch.zeros(lm.d_model)
    rows = torch.cat([vectors.get(layer, zero) for layer in range(1, lm.n_layers)])  # row j is of layer j + 1
    buffer = (ctypes.c_float * len(rows))(*rows.tolist())
    given = (buffer, len(rows), lm.d_model, 1, lm.n_layers - 1)
    for steered in (False, True):
        if steered:
            assert llama_cpp.llama_set_adapter_cvec(llm._ctx.ctx, *given) == 0
        llm.reset()
        llm.eval(ids)
        with torch.no_grad(), sums.applied(lm) if steered else nullcontext():
            wanted = lm.model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(torch.tensor(llm.scores[: len(ids)]), wanted, atol=1e-5, rtol=0)


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
