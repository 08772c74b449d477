"""Kernel tests run on the GPU when there is one, else in Triton's interpreter. Tiny random models of each family."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as each kernel is decorated, so before sae_kernels is imported
torch.set_num_threads(1)  # on small tensors, threads wait for each other longer than they work

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA: Triton's interpreter computes bf16 wrongly"))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh buffers start as NaN or -1, so an element that a kernel forgot to write shows."""

    def poisoned(make):
        def wrapped(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else -1)

        return wrapped

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory):
    """A run folder in which every stage has been run, in small. Copy it before you change it."""
    from sae_persona.demo import DemoConfig, demo
    from sae_persona.sae.recipe import TrainConfig

    config = DemoConfig(
        n_corpus=1000,
        n_quality=20,
        n_train=240,
        n_held_out=100,
        n_development=8,
        n_test=10,
        passes=12,
        training=TrainConfig(n_latents=256, k=8, lr=2e-3, steps=500),
        traits=("cheerful", "formal"),
    )
    said: list[str] = []
    run = demo(tmp_path_factory.mktemp("runs") / "demo", config, say=said.append)
    assert len(said) == 7, said
    return run


# ---- language models


def byte_tokenizer(*, bos: bool = True, sets_bos: bool = True, template: str | None = TEMPLATE):
    """One token a byte, after <pad>, <s> and </s>. It may have a BOS, and may set it before a plain text or not."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

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


def random_lm(family: str, tokenizer):
    import transformers

    from sae_persona.activations.lm import wrap_lm

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **FAMILIES[family])
    return wrap_lm(transformers.AutoModelForCausalLM.from_config(config), tokenizer, name=f"tiny-{family}")


@pytest.fixture
def make_tokenizer():
    return byte_tokenizer


@pytest.fixture(params=FAMILIES)
def any_lm(request):
    """One of each family."""
    return random_lm(request.param, byte_tokenizer())


@pytest.fixture
def make_lm():
    """Any family by name, with any tokenizer."""
    return lambda family="Llama", **tokenizer: random_lm(family, byte_tokenizer(**tokenizer))
