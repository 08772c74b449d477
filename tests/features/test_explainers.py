import pytest
import torch

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.activations.lm import wrap_lm
from sae_persona.errors import ConfigError, ModelError
from sae_persona.features.chat_endpoint import ChatEndpoint
from sae_persona.features.explainers import AskConfig, ExplainerError, LocalChat, open_explainer

CHAT = [{"role": "user", "content": "hi"}]


@torch.no_grad()
def test_a_local_model_takes_the_likeliest_token_each_time(make_tiny_lm):
    lm = make_tiny_lm()
    ids = prompt_tokens(lm, CHAT)
    for _ in range(6):
        ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    wanted = lm.tokenizer.decode(ids[-6:], skip_special_tokens=True).strip()
    assert LocalChat(lm, AskConfig(answer_tokens=6)).complete(CHAT) == wanted


@torch.no_grad()
def test_a_local_model_stops_at_its_end_of_turn(make_tiny_lm):
    lm = make_tiny_lm()
    first = int(lm.model(torch.tensor([prompt_tokens(lm, CHAT)])).logits[0, -1].argmax())
    lm.model.generation_config.eos_token_id = first
    assert LocalChat(lm, AskConfig(answer_tokens=6)).complete(CHAT) == lm.tokenizer.decode([first]).strip()


def test_a_prompt_that_does_not_fit_is_one_latents_trouble(make_tiny_lm):
    with pytest.raises(ExplainerError, match="do not fit into 64 positions"):
        LocalChat(make_tiny_lm(), AskConfig(answer_tokens=60)).complete(CHAT)


def test_a_model_without_a_chat_template_is_refused_at_once(make_tiny_lm):
    lm = make_tiny_lm()
    lm.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        LocalChat(wrap_lm(lm.model, lm.tokenizer, name="base"))


def test_explainers_by_name():
    assert open_explainer("hf:lab").name == "hf:lab"
    made = open_explainer("openai:org/m@q4@http://127.0.0.1:8000/v1/")
    assert isinstance(made, ChatEndpoint) and made.model == "org/m@q4"
    assert made.name == "openai:org/m@q4@http://127.0.0.1:8000/v1"
    for wrong in ("gpt", "openai:gpt", "openai:@http://x", "hf:", "ollama:x"):
        with pytest.raises(ConfigError, match="an explainer reads openai:MODEL@URL or hf:MODEL"):
            open_explainer(wrong)
    with pytest.raises(ModelError):
        open_explainer("hf:./no/such/folder")


def test_settings_out_of_range():
    for wrong in ({"attempts": 0}, {"answer_tokens": 0}, {"timeout": 0.0}, {"backoff": -1.0}):
        with pytest.raises(ConfigError):
            AskConfig(**wrong)
