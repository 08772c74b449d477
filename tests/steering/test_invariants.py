"""An edit does the same thing everywhere a model runs: six families, two sparsity rules, latents and directions.

Run as a program, this file is one of two ranks that share a dictionary.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from sae_persona.activations.hooks import model_inputs
from sae_persona.activations.lm import padded
from sae_persona.sae.model import SAE
from sae_persona.sae.shard import ALONE, Shard, joined
from sae_persona.sae.sharded import ShardedSAE
from sae_persona.sae.sparsity import Threshold, TopK
from sae_persona.steering.apply import intervene
from sae_persona.steering.conditions import When
from sae_persona.steering.interventions import Cap, Clamp, Floor, Placed, Scale, Steer
from sae_persona.types import HookPoint

HOOK = HookPoint(1)
N_LATENTS, D = 41, 16
FAMILIES = ["Llama", "GPT2", "GPTNeoX", "Gemma2", "Qwen3", "Mixtral"]
PROMPTS = [[1, *range(10, 10 + n)] for n in (3, 9, 5)]
families = pytest.mark.parametrize("family", FAMILIES)
rules = pytest.mark.parametrize("rule", ["threshold", "topk"])
pytestmark = pytest.mark.filterwarnings("ignore::sae_persona.steering.rows.EditsMeet")  # 16 dimensions are few


def an_sae(rule: str, device: str = "cpu") -> SAE:
    g = torch.Generator().manual_seed(0)
    w_enc, w_dec = (torch.randn(N_LATENTS, D, generator=g) for _ in range(2))
    made = Threshold(torch.full((N_LATENTS,), 0.5)) if rule == "threshold" else TopK(6)
    w_dec = torch.nn.functional.normalize(w_dec, dim=1)
    return SAE(w_enc, torch.zeros(N_LATENTS), w_dec, torch.zeros(D), made, {"hook": str(HOOK)}).to(device)


def edits(positions="answer"):
    v = torch.randn(D, generator=torch.Generator().manual_seed(5))
    plain = [
        Clamp(3, 2.0, 1.0),
        Floor(7, 0.5, 1.0),
        Scale(20, 3.0),
        Steer(v, 0.5),
        Cap(-v, 0.1, "below"),
    ]
    waiting = Placed(edit=Clamp(30, 1.0, 1.0), positions=positions, when=When(latent=11, above=0.3, scope="turn"))
    return [*(Placed(edit=one, positions=positions) for one in plain), waiting]


def nothing():
    """Edits of which none changes anything."""
    v = torch.ones(D)
    return [Steer(v, 0.0), Scale(3, 1.0), Floor(5, 0.0, 1.0), Cap(v, 1e6, "below")]


def logits(lm, rows, side="left", lengths=None, sae=None, asked=()):
    """Logits at every token of each row, padding cut off."""
    ids, mask = padded(lm, rows, side=side)
    with intervene(lm, sae, asked, hook=HOOK, prompt_lengths=lengths):
        out = lm.model(**model_inputs(lm, ids, mask)).logits
    return [row[keep.bool()] for row, keep in zip(out, mask, strict=True)]


def generate(lm, rows, **options):
    ids, mask = padded(lm, rows)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    return lm.model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


def close(got, wanted, atol=1e-5):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=atol, rtol=1e-5)


@families
@rules
def test_padding_and_batch_change_nothing(make_lm, family, rule):
    lm, sae = make_lm(family), an_sae(rule)
    lengths = [len(row) - 1 for row in PROMPTS]
    alone = [logits(lm, [row], sae=sae, asked=edits(), lengths=[n])[0] for row, n in zip(PROMPTS, lengths, strict=True)]
    for side in ("left", "right"):
        close(logits(lm, PROMPTS, side, lengths, sae, edits()), alone)
    plain = logits(lm, PROMPTS)
    assert all((a - b)[-1].abs().max() > 1e-3 for a, b in zip(alone, plain, strict=True)), "the edits do something"


@families
@rules
def test_the_cache_changes_nothing(make_lm, family, rule):
    lm, sae = make_lm(family), an_sae(rule)
    with intervene(lm, sae, edits(), hook=HOOK):
        cached, fresh = generate(lm, PROMPTS), generate(lm, PROMPTS, use_cache=False)
        alone = [generate(lm, [row])[0] for row in PROMPTS]
    assert torch.equal(cached, fresh)
    assert torch.equal(cached, torch.stack(alone))


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
@rules
def test_a_static_cache_changes_nothing(make_lm, family, rule, monkeypatch):
    lm, sae = make_lm(family), an_sae(rule)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # which a static cache asks for
    with intervene(lm, sae, edits(), hook=HOOK):
        assert torch.equal(generate(lm, PROMPTS, cache_implementation="static"), generate(lm, PROMPTS))


@families
@rules
def test_every_decoding_step_is_the_prefill_of_as_many_tokens(make_lm, family, rule):
    lm, sae = make_lm(family), an_sae(rule)
    with intervene(lm, sae, edits(), hook=HOOK):
        made = lm.model.generate(
            torch.tensor([PROMPTS[1]]), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    whole = made.sequences[0].tolist()
    n = len(PROMPTS[1])
    stepwise = torch.cat(made.logits)
    close([stepwise], [logits(lm, [whole], lengths=[n], sae=sae, asked=edits())[0][n - 1 : -1]])


@families
def test_one_seed_gives_one_sample(make_lm, family):
    lm, sae = make_lm(family), an_sae("threshold")
    found = []
    for cache in (True, True, False):
        torch.manual_seed(3)
        with intervene(lm, sae, edits(), hook=HOOK):
            found.append(generate(lm, PROMPTS, do_sample=True, use_cache=cache))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@families
@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dose_of_zero_is_bit_identical(make_lm, family, rule, dtype):
    lm, sae = make_lm(family), an_sae(rule)
    lm.model.to(dtype)
    plain = logits(lm, PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(logits(lm, PROMPTS, sae=sae, asked=nothing()), plain, strict=True))


@families
def test_beams_are_the_same_with_and_without_a_cache(make_lm, family):
    lm, sae = make_lm(family), an_sae("threshold")
    with intervene(lm, sae, edits()[:-1], hook=HOOK):
        found = [generate(lm, PROMPTS, num_beams=3, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)


@families
def test_bf16_is_the_edit_in_bf16(make_lm, family):
    """Edits are computed in fp32 and rounded once, so a model in bf16 is off by its own rounding only."""
    lm, sae = make_lm(family), an_sae("threshold")
    exact = logits(lm, PROMPTS, sae=sae, asked=edits())
    scale = float(torch.cat(exact).detach().std())
    lm.model.to(torch.bfloat16)
    close(logits(lm, PROMPTS, sae=sae, asked=edits()), exact, atol=0.15 * scale)
    close(logits(lm, PROMPTS, "right", sae=sae, asked=edits()), exact, atol=0.15 * scale)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3"])
def test_gradients_are_those_without_checkpointing(make_lm, family):
    lm, sae = make_lm(family), an_sae("threshold")
    lm.model.requires_grad_(True).train()
    ids, mask = padded(lm, PROMPTS, side="right")

    def gradients():
        lm.model.zero_grad()
        with intervene(lm, sae, edits("all"), hook=HOOK):
            lm.model(**model_inputs(lm, ids, mask), labels=ids).loss.backward()
        return [p.grad.clone() for p in lm.model.parameters() if p.grad is not None]

    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients()
    lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    close(gradients(), plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo's own
@rules
def test_a_compiled_model_gives_the_same(make_lm, rule):
    lm, sae = make_lm(), an_sae(rule)
    wanted = logits(lm, PROMPTS, sae=sae, asked=edits())
    torch._dynamo.reset()
    lm.model.forward = torch.compile(lm.model.forward, backend="eager", dynamic=True)
    close(logits(lm, PROMPTS, sae=sae, asked=edits()), wanted)
    close(logits(lm, PROMPTS[:2], "right", sae=sae, asked=edits()), wanted[:2])
    close(logits(lm, PROMPTS), logits(make_lm(), PROMPTS))


# ---- two ranks


def found_by(shard: Shard, rule: str):
    """Logits of a tiny model under edits of an SAE that the ranks share."""
    import transformers

    from sae_persona.activations.lm import wrap_lm

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=D, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    lm = wrap_lm(transformers.LlamaForCausalLM(config), _NoTokenizer(), name="tiny")
    sae = an_sae(rule) if shard.world == 1 else ShardedSAE(an_sae(rule), shard)
    ids = torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])
    with torch.no_grad(), intervene(lm, sae, edits(), hook=HOOK, prompt_lengths=[7, 7]):
        return lm.model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


class _NoTokenizer:
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0


def test_two_ranks_that_share_the_latents_find_what_one_finds(tmp_path):
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    env["MASTER_PORT"] = str(20_000 + os.getpid() % 20_000)
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path / f"{rank}.pt")], env=env | {"RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for rule in ("threshold", "topk"):
            torch.testing.assert_close(got[rule], found_by(ALONE, rule), atol=1e-5, rtol=1e-5)


def main() -> None:
    torch.set_num_threads(1)
    with joined("cpu", timeout=timedelta(seconds=60)) as shard:
        torch.save({rule: found_by(shard, rule) for rule in ("threshold", "topk")}, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
