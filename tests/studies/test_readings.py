import pytest
import torch

from sae_persona.activations.hooks import read
from sae_persona.activations.lm import padded
from sae_persona.errors import DataError, ModelError
from sae_persona.studies.readings import Prompt, check_comparable, check_finite, read_prompted, read_prompts, together
from sae_persona.types import HookPoint

HOOK = HookPoint(1)


def test_reads_the_last_token_of_each_prompt_once(any_lm, prompt_rows):
    prompts = read_prompts([*prompt_rows, prompt_rows[0]])
    found = read_prompted(any_lm, HOOK, prompts, batch=4)
    assert len(found.keys) == len(prompt_rows), "the one that stands twice counts once"
    ids = prompts[1].tokens(any_lm)
    alone = read(any_lm, [HOOK], *padded(any_lm, [ids]))[HOOK][0, -1]
    torch.testing.assert_close(found.x[1], alone.float(), rtol=1e-4, atol=1e-5)


def test_prompts_of_every_kind():
    answered = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no", "name": "bob"}]}
    cut, plain = read_prompts([answered, "just a text"])
    assert cut.messages == ({"role": "user", "content": "hi"},) and cut.speaker == "bob"
    assert plain.text == "just a text" and not plain.messages
    for one in (cut, plain):
        assert Prompt.from_row(one.to_row()) == one
    with pytest.raises(DataError, match="only an answer"):
        read_prompts([{"messages": [{"role": "assistant", "content": "no"}]}])


def test_joined_by_tokens(make_lm, prompt_rows):
    lm = make_lm("Llama")
    prompts = read_prompts(prompt_rows)
    one, other = read_prompted(lm, HOOK, prompts[:5]), read_prompted(lm, HOOK, prompts[3:][::-1])
    a, b = together([one, other])
    assert a.keys == b.keys == one.keys[3:]
    torch.testing.assert_close(a.x, b.x)
    with pytest.raises(DataError, match="share 0 prompts"):
        together([one, read_prompted(lm, HOOK, prompts[6:])])


def test_another_template_asks_something_else(make_lm, prompt_rows):
    prompts = read_prompts(prompt_rows)
    other = make_lm("Llama", template="{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    readings = [read_prompted(lm, HOOK, prompts) for lm in (make_lm("Llama"), other)]
    with pytest.raises(DataError, match="share 0 prompts"):
        together(readings)


def test_what_cannot_be_compared(make_lm, make_tokenizer):
    lm = make_lm("Llama")
    check_comparable(lm, make_lm("Llama"))
    with pytest.raises(ModelError, match="has model_type gpt2"):
        check_comparable(lm, make_lm("GPT2"))
    other = make_lm("Llama")
    other.tokenizer.add_tokens(["<more>"])
    with pytest.raises(ModelError, match="different tokenizers"):
        check_comparable(lm, other)


def test_broken_weights_are_named(make_lm, prompt_rows):
    lm = make_lm("Llama")
    check_finite(lm)
    with torch.no_grad():
        lm.model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="tiny-Llama is broken: model.layers.2.mlp.up_proj.weight"):
        read_prompted(lm, HOOK, read_prompts(prompt_rows))


def test_too_long(make_lm):
    with pytest.raises(DataError, match="reads 1 to 64"):
        read_prompted(make_lm("Llama"), HOOK, read_prompts(["x" * 80]))
