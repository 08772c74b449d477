import pytest
import torch
from torch import nn

from sae_persona.activations.hooks import editing, model_inputs, read, watching
from sae_persona.activations.lm import padded
from sae_persona.errors import ConfigError, ModelError
from sae_persona.types import HookPoint

IDS = [[1, 40, 50, 60, 70], [1, 45, 55]]


def counted(module: nn.Module) -> list:
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def n_hooks(lm) -> int:
    return sum(len(block._forward_hooks) + len(block._forward_pre_hooks) for block in lm.blocks)


def test_read_is_the_next_hidden_state(any_lm):
    ids, mask = padded(any_lm, IDS)
    hidden = any_lm.model(**model_inputs(any_lm, ids, mask), output_hidden_states=True).hidden_states
    found = read(any_lm, any_lm.hook_points(), ids, mask)
    for layer in range(any_lm.n_layers):
        torch.testing.assert_close(found[HookPoint(layer, "resid_pre")], hidden[layer], rtol=0, atol=0)
        if layer < any_lm.n_layers - 1:  # Hugging Face applies the final norm to the last
            torch.testing.assert_close(found[HookPoint(layer)], hidden[layer + 1], rtol=0, atol=0)


def test_padding_side_makes_no_difference(any_lm):
    hook = HookPoint(2)
    left = read(any_lm, [hook], *padded(any_lm, IDS, side="left"))[hook]
    right = read(any_lm, [hook], *padded(any_lm, IDS, side="right"))[hook]
    alone = read(any_lm, [hook], *padded(any_lm, IDS[1:]))[hook][0]
    for short in (left[1, 2:], right[1, :3]):
        torch.testing.assert_close(short, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(left[0], right[0], rtol=0, atol=1e-5)


def test_nothing_runs_after_the_last_hook_point(any_lm):
    blocks = [counted(block) for block in any_lm.blocks]
    logits = counted(any_lm.model.get_output_embeddings())
    read(any_lm, [HookPoint(0), HookPoint(1)], *padded(any_lm, IDS))
    assert [len(calls) for calls in blocks] == [1, 1, 0]
    read(any_lm, [HookPoint(2, "resid_pre")], *padded(any_lm, IDS))
    assert [len(calls) for calls in blocks] == [2, 2, 0]
    read(any_lm, [HookPoint(2), HookPoint(2, "resid_pre")], *padded(any_lm, IDS))
    assert [len(calls) for calls in blocks] == [3, 3, 1]
    assert not logits


def test_tuple_outputs_as_tensor_outputs(lm, make_lm):
    bare, wrapped = lm, make_lm()

    class Tupled(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            return self.block(*args, **kwargs), "cache"

    last = wrapped.blocks[2]  # only the last, whose output nobody unpacks once the forward stops
    wrapped.blocks[2] = Tupled(last)
    batch = padded(lm, IDS)
    hook = HookPoint(2)
    assert torch.equal(read(bare, [hook], *batch)[hook], read(wrapped, [hook], *batch)[hook])


def test_read_leaves_no_hook_and_no_gradient(lm):
    batch = padded(lm, IDS)
    assert not read(lm, [HookPoint(1)], *batch)[HookPoint(1)].requires_grad
    assert read(lm, [], *batch) == {}
    with pytest.raises(ModelError, match=r"layers.3.resid_post does not exist"):
        read(lm, [HookPoint(0), HookPoint(3)], *batch)
    with pytest.raises(IndexError):
        read(lm, [HookPoint(0)], batch[0] + 1000, batch[1])
    assert n_hooks(lm) == 0


def test_editing_by_nothing_changes_nothing(any_lm):
    inputs = model_inputs(any_lm, *padded(any_lm, IDS))
    plain = any_lm.model(**inputs).logits
    for hook in any_lm.hook_points():
        with editing(any_lm, hook, lambda x: x + 0):
            assert torch.equal(any_lm.model(**inputs).logits, plain)


def test_editing_replaces_the_stream(any_lm):
    """What enters block 2 is what the edit of block 1's output returned; editing that input gives the same logits."""
    batch = padded(any_lm, IDS)
    inputs = model_inputs(any_lm, *batch)
    plain = any_lm.model(**inputs).logits
    shift = torch.randn(16, generator=torch.Generator().manual_seed(0))
    before = read(any_lm, [HookPoint(1)], *batch)[HookPoint(1)]
    with editing(any_lm, HookPoint(1), lambda x: x + shift):
        after = read(any_lm, [HookPoint(2, "resid_pre")], *batch)[HookPoint(2, "resid_pre")]
        posted = any_lm.model(**inputs).logits
    with editing(any_lm, HookPoint(2, "resid_pre"), lambda x: x + shift):
        pre = any_lm.model(**inputs).logits
    torch.testing.assert_close(after, before + shift)
    assert torch.equal(posted, pre)
    assert not torch.allclose(posted, plain)
    assert torch.equal(any_lm.model(**inputs).logits, plain)


def test_edits_nest_and_go_on_any_exit(lm):
    batch, hook = padded(lm, IDS), HookPoint(0)
    before = read(lm, [hook], *batch)[hook]
    with pytest.raises(KeyError), editing(lm, hook, lambda x: x + 1):
        with editing(lm, hook, lambda x: x * 2):
            torch.testing.assert_close(read(lm, [hook], *batch)[hook], (before + 1) * 2)
        assert n_hooks(lm) == 1
        raise KeyError
    assert n_hooks(lm) == 0
    with pytest.raises(ModelError, match="does not exist"), editing(lm, HookPoint(3), lambda x: x):
        pass


def test_gradients_pass_through_an_edit(lm):
    shift = torch.zeros(16, requires_grad=True)
    with editing(lm, HookPoint(1), lambda x: x + shift):
        lm.model(**model_inputs(lm, *padded(lm, IDS))).logits.square().sum().backward()
    assert shift.grad is not None and shift.grad.abs().max() > 0


def test_edits_reach_every_step_of_generation(lm):
    widths = []

    def note(x):
        widths.append(x.shape[1])
        return x

    with editing(lm, HookPoint(1), note):
        lm.model.generate(torch.tensor(IDS[:1]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert widths == [5, 1, 1]


def test_positions_only_where_the_forward_takes_them(lm):
    ids, mask = padded(lm, IDS)
    assert model_inputs(lm, ids, mask)["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]

    class Plain(nn.Module):
        def forward(self, input_ids, attention_mask): ...

    bare = type(lm)(Plain(), lm.tokenizer, lm.blocks, "", "plain")
    assert set(model_inputs(bare, ids, mask)) == {"input_ids", "attention_mask"}


def test_watching_counts_real_tokens_through_padding_and_cache(lm):
    ids, mask = padded(lm, IDS)
    calls = []
    with watching(lm, calls.append):
        lm.model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    first, second, _ = calls
    assert first.past == 0 and torch.equal(first.real, mask.bool()) and torch.equal(first.input_ids, ids)
    assert first.index[0].tolist() == [0, 1, 2, 3, 4] and first.index[1, 2:].tolist() == [0, 1, 2]
    assert second.past == 5 and second.index.tolist() == [[5], [3]] and second.real.all()
    with watching(lm, calls.append):
        lm.model(ids)  # no mask: all of it is real
    assert calls[-1].real.all()
    lm.model(ids)
    assert len(calls) == 4


def test_watching_refuses_a_mask_that_tells_no_positions(lm):
    ids, mask = padded(lm, IDS)
    with pytest.raises(ConfigError, match=r"attention mask of shape \[2, 5\], got \[2, 1, 5, 5\]"):
        with watching(lm, lambda _: None):
            lm.model(ids, attention_mask=mask[:, None, None, :].expand(-1, 1, 5, -1))
