from types import SimpleNamespace

import pytest
import torch
import transformers

from sae_persona.activations.lm import LM, wrap_lm
from sae_persona.errors import DataError, ModelError
from sae_persona.sae.model import SAE
from sae_persona.sae.quality import quality
from sae_persona.sae.sparsity import ReLU
from sae_persona.types import HookPoint

D, HOOK = 16, HookPoint(1)
TEXTS = ["the cat sat on the mat", "a", "dogs bark at the moon all night long"]


class Letters:
    """A tokenizer of one token a character after BOS, as much of one as is read here."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_) -> SimpleNamespace:
        def ids(one: str) -> list[int]:
            return [1] * add_special_tokens + [3 + ord(letter) % 64 for letter in one]

        return SimpleNamespace(input_ids=ids(text) if isinstance(text, str) else [ids(one) for one in text])


@pytest.fixture(scope="module")
def lm() -> LM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=70, hidden_size=D, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    model.lm_head.weight.mul_(20)  # so that what is lost shows in the predictions
    return wrap_lm(model, Letters(), name="tiny")


def mirror(scale: float = 1.0) -> SAE:
    """Latents +x and -x of each coordinate: rebuilds scale * x exactly."""
    eye = torch.cat([torch.eye(D), -torch.eye(D)])
    return SAE(scale * eye, torch.zeros(2 * D), eye, torch.zeros(D), ReLU())


def test_a_perfect_sae_loses_nothing(lm):
    q = quality(lm, HOOK, mirror(), TEXTS)
    assert q.n_tokens == sum(map(len, TEXTS)) and q.l0 == D and q.dead == 0
    assert q.fvu < 1e-10 and abs(q.kl_spliced) < 1e-6 and q.kl_zero > 1e-2 and q.kl_mean > 1e-2
    assert q.ce_spliced == pytest.approx(q.ce, abs=1e-5)
    assert q.ce_recovered is None or q.ce_recovered == pytest.approx(1, abs=1e-3)


def test_an_sae_that_rebuilds_zeros_is_zero_ablation(lm):
    q = quality(lm, HOOK, mirror(scale=0.0), TEXTS)
    assert q.dead == 1 and q.l0 == 0
    assert q.ce_spliced == pytest.approx(q.ce_zero) and q.kl_spliced == pytest.approx(q.kl_zero)


def test_an_sae_that_rebuilds_the_mean_is_mean_ablation_with_fvu_1(lm):
    acts = torch.cat([one_by_one(lm, text)[0] for text in TEXTS])
    sae = mirror(scale=0.0)
    sae.b_dec.copy_(acts.mean(dim=0))
    q = quality(lm, HOOK, sae, TEXTS)
    assert q.fvu == pytest.approx(1, abs=1e-4) and q.kl_spliced == pytest.approx(q.kl_mean, rel=1e-4)


def one_by_one(lm: LM, text: str, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unpadded, by hand: activations after block 1, log probabilities and targets, all without BOS."""
    ids = torch.tensor([Letters()(text).input_ids])
    seen = []

    def hook(module, args, output):
        seen.append(output[0, 1:])
        if scale is not None:
            return torch.cat([output[:, :1], scale * output[:, 1:]], dim=1)

    handle = lm.blocks[1].register_forward_hook(hook)
    logits = lm.model(input_ids=ids).logits
    handle.remove()
    return seen[0], logits[0, 1:-1].log_softmax(dim=-1), ids[0, 2:]


@pytest.mark.parametrize("lm_batch", [1, 2, 32])
def test_measures_are_those_of_unpadded_texts_with_bos_left_alone(lm, lm_batch):
    q = quality(lm, HOOK, mirror(scale=0.5), TEXTS, lm_batch=lm_batch)
    plain, halved, targets = [], [], []
    for text in TEXTS:
        _, log_probs, ids = one_by_one(lm, text)
        plain.append(log_probs)
        halved.append(one_by_one(lm, text, scale=0.5)[1])
        targets.append(ids)
    p, h, y = torch.cat(plain), torch.cat(halved), torch.cat(targets)[:, None]
    assert q.ce == pytest.approx(-p.gather(1, y).mean().item(), rel=1e-4)
    assert q.ce_spliced == pytest.approx(-h.gather(1, y).mean().item(), rel=1e-4)
    assert q.kl_spliced == pytest.approx((p.exp() * (p - h)).sum(dim=1).mean().item(), rel=1e-3)
    x = torch.cat([one_by_one(lm, text)[0] for text in TEXTS])
    assert q.fvu == pytest.approx((0.25 * x.square().sum() / (x - x.mean(dim=0)).square().sum()).item(), rel=1e-4)


def test_answers_only(lm):
    rows = [{"text": "abcdef", "labels": {"pirate": 1.0}}, {"text": "gh", "labels": {"pirate": 0.0}}]
    assert quality(lm, HOOK, mirror(), rows, tokens="answers").n_tokens == 8
    with pytest.raises(DataError):
        quality(lm, HOOK, mirror(), TEXTS, tokens="answers")  # plain texts have none


def test_what_cannot_be_measured_is_refused(lm):
    with pytest.raises(ModelError, match="layers 0 to 2"):
        quality(lm, HookPoint(3), mirror(), TEXTS)
    wide = SAE(torch.zeros(4, D + 1), torch.zeros(4), torch.zeros(4, D + 1), torch.zeros(D + 1), ReLU())
    with pytest.raises(ModelError, match="reads width 17"):
        quality(lm, HOOK, wide, TEXTS)
    with pytest.raises(DataError, match="no token of the texts has a next one"):
        quality(lm, HOOK, mirror(), ["a"])


def test_a_transcoder_is_refused(lm):
    sae = mirror()
    sae.transcodes = True
    with pytest.raises(ModelError, match="is a transcoder"):
        quality(lm, HOOK, sae, TEXTS)


def test_progress_is_drawn_on_stderr_where_it_is_asked_for(lm, capsys):
    quality(lm, HOOK, mirror(), TEXTS, lm_batch=2)
    assert capsys.readouterr().err == ""
    quality(lm, HOOK, mirror(), TEXTS, lm_batch=2, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "held-out" in err and "4/4" in err
