import pytest
import torch

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.errors import ConfigError, DataError
from sae_persona.steering.answers import Answer, AnswerConfig, answer, say, surprise


def test_the_same_seed_gives_the_same_answers_and_leaves_torchs_alone(lm, prompts):
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    first = answer(lm, prompts, AnswerConfig(seed=1))
    assert torch.equal(torch.rand(1), wanted)
    assert answer(lm, prompts, AnswerConfig(seed=1)) == first
    assert answer(lm, prompts, AnswerConfig(seed=2)) != first


def test_answers_come_in_the_order_of_the_prompts(lm, prompts):
    greedy = AnswerConfig(temperature=0.0, batch=2)
    together = answer(lm, prompts, greedy)
    assert together[::-1] == answer(lm, prompts[::-1], greedy)


def test_an_answer_ends_at_the_end_of_the_turn(lm, prompts):
    for found in answer(lm, prompts, AnswerConfig(temperature=0.0, max_new_tokens=60)):
        assert "<nl>" not in found.text
        assert found.ids.count(lm.tokenizer.eos_token_id) == 1
        assert found.ids[-1] == lm.tokenizer.eos_token_id
        assert found.text == lm.tokenizer.decode(found.ids[:-1])


def test_a_stop_text_cuts_text_and_tokens(lm, prompts):
    plain = answer(lm, prompts, AnswerConfig(temperature=0.0))
    word = plain[0].text.split()[1]
    cut = answer(lm, prompts, AnswerConfig(temperature=0.0, stop=(word,)))
    assert cut[0].text == plain[0].text.split()[0]
    assert cut[0].ids == plain[0].ids[:1]


def test_surprise_is_the_models_own(lm, prompts):
    """Against a plain loop: one answer at a time, no padding."""
    answers = answer(lm, prompts, AnswerConfig(seed=4))
    got = surprise(lm, prompts, answers, batch=3)
    for row, prompt, found in zip(got, prompts, answers, strict=True):
        ids = torch.tensor([prompt + found.ids])
        logp = lm.model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        wanted = -logp.gather(1, torch.tensor(found.ids)[:, None]).sum()
        torch.testing.assert_close(
            row, torch.tensor([wanted.item(), len(found.ids)], dtype=torch.float64), atol=1e-4, rtol=0
        )


def test_what_cannot_be_answered_is_refused(lm, prompts):
    with pytest.raises(DataError, match="at least one token"):
        answer(lm, [[]])
    with pytest.raises(DataError, match="at least one token"):
        answer(lm, [])
    with pytest.raises(DataError, match="do not fit into the 256 positions of lab"):
        answer(lm, prompts, AnswerConfig(max_new_tokens=250))
    with pytest.raises(ConfigError, match="max_new_tokens and batch are at least 1"):
        AnswerConfig(batch=0)


def test_an_empty_answer_surprises_nobody(lm):
    prompt = prompt_tokens(lm, [{"role": "user", "content": "what do you want ?"}])
    assert surprise(lm, [prompt], [Answer("", [])]).tolist() == [[0.0, 0.0]]


def test_say_asks_as_the_chat_template_does(lm):
    greedy = AnswerConfig(temperature=0.0)
    prompt = prompt_tokens(lm, [{"role": "user", "content": "what do you want ?"}])
    assert say(lm, "what do you want ?", greedy) == answer(lm, [prompt], greedy)[0].text
