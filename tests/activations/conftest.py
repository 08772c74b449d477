"""Tiny random models of each family and a byte tokenizer, all made in memory."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from sae_persona.activations.lm import LM, wrap_lm

SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES = {
    "Llama": {},
    "GPT2": {},
    "GPTNeoX": {},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "Phi": {},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 3},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 8},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8},
    "GPTJ": {"rotary_dim": 4},  # its blocks return tuples
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['name'] if 'name' in m else m['role'] }}>{{ m['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def byte_tokenizer(*, bos: bool = True, sets_bos: bool = True, template: str | None = TEMPLATE):
    """One token a byte, after <pad>, <s> and </s>. It may have a BOS, and may set it before a plain text or not."""
    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos and sets_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
    )


def random_lm(family: str, tokenizer) -> LM:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **FAMILIES[family])
    return wrap_lm(transformers.AutoModelForCausalLM.from_config(config), tokenizer, name=f"tiny-{family}")


@pytest.fixture
def make_tokenizer():
    return byte_tokenizer


@pytest.fixture(params=FAMILIES)
def any_lm(request) -> LM:
    """One of each family."""
    return random_lm(request.param, byte_tokenizer())


@pytest.fixture
def make_lm():
    """Any family by name, with any tokenizer."""
    return lambda family="Llama", **tokenizer: random_lm(family, byte_tokenizer(**tokenizer))


@pytest.fixture
def lm(make_lm) -> LM:
    return make_lm()
