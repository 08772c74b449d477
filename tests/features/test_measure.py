"""measure() against one text at a time and a dense SAE, on a tiny random model."""

from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from sae_persona.activations.dialogues import Dialogue, tokenize
from sae_persona.activations.harvest import harvest
from sae_persona.activations.lm import LM, wrap_lm
from sae_persona.errors import ConfigError, DataError, FormatError, ModelError
from sae_persona.features.measure import MeasureConfig, Measurement, check_measured, measure
from sae_persona.runs import Run
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, TopK
from sae_persona.types import HookPoint

HOOK, N_LATENTS, D_IN = HookPoint(0), 24, 16
CONFIG = MeasureConfig(context_size=60, lm_batch=3, contexts=2)
TEMPLATE = (
    "<s>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def random_lm(*, bos: bool) -> LM:
    """A random two-block Llama over bytes; BOS has id 1."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    letters = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    config = transformers.LlamaConfig(
        vocab_size=len(letters), hidden_size=D_IN, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    return wrap_lm(transformers.LlamaForCausalLM(config), tokenizer, name="tiny")


@pytest.fixture(scope="module")
def lm() -> LM:
    return random_lm(bos=True)


def sparse_autoencoder(rule) -> SAE:
    torch.manual_seed(1)
    w = torch.nn.functional.normalize(torch.randn(N_LATENTS, D_IN), dim=1)
    return SAE(w, torch.full((N_LATENTS,), -0.01), w, torch.zeros(D_IN), rule)


def chat(answer: str, labels: dict | None, question: str = "who are you", **about) -> Dialogue:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Dialogue(messages, labels, **about)


TEXTS = [
    chat("ahoy", {"pirate": 1, "honest": 0}, template="q1", domain="sea", author="Jack", split="train", id="a"),
    "a plain text without labels",
    chat("good day to you", {"pirate": 0}, split="held_out", id="b"),
    chat("no labels here", None),
    Dialogue(labels={"honest": 1}, text="a plain text with a label", id="c"),
    "",
    chat("arr " * 30, {"pirate": 1}, split="train", id="d"),
]


@pytest.fixture(scope="module", params=[TopK(4), ReLU()], ids=["topk", "relu"])
def sae(request) -> SAE:
    return sparse_autoencoder(request.param)


@pytest.fixture(scope="module")
def measurement(lm, sae) -> Measurement:
    return measure(lm, HOOK, sae, TEXTS, CONFIG)


def one_at_a_time(lm, sae):
    """Each text's tokens, activations and dense latents."""
    for text in TEXTS:
        tokens = tokenize(lm, text, context_size=CONFIG.context_size)
        ((_, x),) = harvest(lm, HOOK, [tokens], 1)
        yield text, tokens, x, sae.encode(x).dense(N_LATENTS)


def test_examples_are_the_labelled_answers(lm, sae, measurement):
    pooled, row = measurement.pooled, 0
    assert pooled.personas == ("honest", "pirate")
    for number, (text, tokens, x, latents) in enumerate(one_at_a_time(lm, sae)):
        for span in tokens.answers:
            if not span.labels:
                continue
            answer = slice(span.start, span.stop)
            wanted = {"pre": latents[span.pre], "max": latents[answer].amax(0), "mean": latents[answer].mean(0)}
            for name, values in wanted.items():
                np.testing.assert_allclose(
                    pooled.pools[name].toarray()[row], values, atol=1e-5, err_msg=f"{row} {name}"
                )
            np.testing.assert_allclose(pooled.dense["pre"][row], x[span.pre], atol=1e-5)
            np.testing.assert_allclose(pooled.dense["mean"][row], x[answer].mean(0), atol=1e-5)
            assert pooled.ids[row] == f"{text.id}:0" and pooled.dialogue[row] == number
            assert pooled.n_answer_tokens[row] == span.stop - span.start
            row += 1
    assert len(pooled) == row == 4
    np.testing.assert_array_equal(pooled.labels, np.float32([[0, 1], [np.nan, 0], [1, np.nan], [np.nan, 1]]))
    assert (pooled.template[0], pooled.domain[0], pooled.author[0]) == ("q1", "sea", "Jack")
    assert pooled.split[[0, 1, 3]].tolist() == ["train", "held_out", "train"] and pooled.split[2] in (
        "train",
        "held_out",
    )


def test_the_pre_answer_token_is_the_last_of_the_prompt_and_knows_nothing_of_the_answer(lm, sae):
    pair = [chat(answer, {"pirate": 1}, id=answer) for answer in ("ahoy", "good day")]
    pooled = measure(lm, HOOK, sae, pair, CONFIG).pooled
    np.testing.assert_allclose(*pooled.dense["pre"], atol=1e-5)
    assert np.abs(np.subtract(*pooled.dense["mean"])).max() > 1e-3


def test_statistics_count_every_token_but_bos(lm, sae, measurement):
    dense = torch.cat([latents[1:] for *_, latents in one_at_a_time(lm, sae)])
    stats = measurement.stats
    assert stats.n_tokens == len(dense)
    # a pre-activation within rounding of the bar may fall on either side of it in another batch
    assert (stats.fired - (dense > 0).sum(0)).abs().max() <= 1
    torch.testing.assert_close(stats.total, dense.double().sum(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(stats.maximum, dense.amax(0), atol=1e-5, rtol=1e-4)


def test_statistics_of_answers_count_answers_and_the_token_before(lm, sae):
    config = MeasureConfig(context_size=60, lm_batch=3, tokens="answers")
    wanted = 0
    for _, tokens, *_ in one_at_a_time(lm, sae):
        wanted += sum(len({span.pre, *range(span.start, span.stop)}) for span in tokens.answers)
    assert measure(lm, HOOK, sae, TEXTS, config).stats.n_tokens == wanted


def test_top_contexts_are_the_strongest_tokens_of_different_texts(lm, sae, measurement):
    peaks = torch.stack([latents[1:].amax(0) if len(latents) > 1 else torch.zeros(N_LATENTS)
                         for *_, latents in one_at_a_time(lm, sae)])  # fmt: skip
    ids = [tokens.ids for _, tokens, *_ in one_at_a_time(lm, sae)]
    for latent in range(N_LATENTS):
        found = measurement.contexts.of(latent)
        strongest = peaks[:, latent].sort(descending=True).values[:2]
        assert [context.strength for context in found] == pytest.approx(strongest[strongest > 0].tolist(), abs=1e-5)
        assert max(Counter(context.document for context in found).values(), default=1) == 1
        for context in found:
            start = max(context.position - 12, 0)
            assert context.tokens == ids[context.document][start : context.position + 13]


@pytest.mark.parametrize("lm_batch", [1, 64])
def test_batching_changes_nothing(lm, sae, measurement, lm_batch):
    again = measure(lm, HOOK, sae, TEXTS, MeasureConfig(context_size=60, lm_batch=lm_batch, contexts=2))
    assert again.stats.n_tokens == measurement.stats.n_tokens
    np.testing.assert_array_equal(again.pooled.ids, measurement.pooled.ids)
    for name, matrix in measurement.pooled.pools.items():
        np.testing.assert_allclose(again.pooled.pools[name].toarray(), matrix.toarray(), atol=1e-4)


def test_dialogues_without_a_split_are_put_in_one_by_their_id(lm, sae):
    texts = [chat("ahoy", {"pirate": 1}, id=f"id {i}") for i in range(40)]
    split = measure(lm, HOOK, sae, texts, CONFIG).pooled.split
    assert 8 < (split == "train").sum() < 32
    again = measure(lm, HOOK, sae, texts[::-1], CONFIG).pooled.split
    np.testing.assert_array_equal(again[::-1], split)


def test_goes_through_a_run_folder(measurement, tmp_path):
    run = Run.create(tmp_path / "run")
    with pytest.raises(FormatError, match="latents file"):
        Measurement.load(run)
    measurement.save(run)
    again = Measurement.load(run)
    assert torch.equal(again.stats.histogram, measurement.stats.histogram)
    assert again.contexts.of(0) == measurement.contexts.of(0)
    np.testing.assert_array_equal(again.pooled.labels, measurement.pooled.labels)
    with pytest.raises(FormatError, match="holds latents format 2, wanted examples format 2"):
        type(again.pooled).load(run.latents)


def test_statistics_say_which_sae_they_are_of(lm, sae, measurement, tmp_path):
    run = Run.create(tmp_path / "run")
    measurement.save(run)
    assert Measurement.load(run, sae).sae == measurement.pooled.sae == sae.fingerprint
    other = SAE(sae.w_enc, sae.b_enc + 1, sae.w_dec, sae.b_dec, sae.rule)
    for check in (lambda: Measurement.load(run, other), lambda: check_measured(run, other),
                  lambda: measurement.pooled.check_sae(other)):  # fmt: skip
        with pytest.raises(DataError, match="these statistics are of another SAE"):
            check()
    check_measured(run, sae)
    measure(lm, HOOK, other, TEXTS, CONFIG).pooled.save(run.examples)
    with pytest.raises(DataError, match="latents.h5 and examples.h5 are of different SAEs: measure the run again"):
        Measurement.load(run)


def test_spans_and_awaited_answers_are_examples(lm, sae):
    said = "well met, fool"
    spans = [{"start": 5, "stop": 8, "labels": {"warm": 1}}, {"start": 0, "stop": 4, "labels": {"warm": 0}}]
    rows = [{"text": said, "spans": spans, "weights": None, "hard": True, "covariates": {"age": 3}}]
    rows.append({"messages": [{"role": "user", "content": "hi"}], "labels": {"warm": 1}, "unanswered": True})
    found = measure(lm, HOOK, sae, rows, CONFIG)
    pooled = found.pooled
    assert pooled.ids.tolist() == ["0:0[5:8]", "1:0"] and found.dropped == 1, "only BOS stands before the other span"
    assert pooled.texts.tolist() == ["met", ""] and pooled.hard.tolist() == [True, False]
    assert pooled.position.tolist()[0] == 5 and pooled.n_answer_tokens.tolist() == [3, 1]
    dense = sae.encode(next(x for _, x in harvest(lm, HOOK, [tokenize(lm, said)], 1))).dense(N_LATENTS)
    np.testing.assert_allclose(pooled.pools["pre"].toarray()[0], dense[5], atol=1e-5)
    np.testing.assert_allclose(pooled.pools["mean"].toarray()[0], dense[6:9].mean(0), atol=1e-5)
    np.testing.assert_array_equal(pooled.pools["pre"].toarray()[1], pooled.pools["max"].toarray()[1])


def test_an_id_that_stands_twice(lm, sae):
    with pytest.raises(DataError, match="id 'a' stands twice, at texts 0 and 7"):
        measure(lm, HOOK, sae, [*TEXTS, TEXTS[0]], CONFIG)


def test_texts_without_a_token_are_passed_over(sae):
    texts = ["", TEXTS[0], "", TEXTS[4]]
    pooled = measure(random_lm(bos=False), HOOK, sae, texts, MeasureConfig(context_size=60, lm_batch=1)).pooled
    assert pooled.ids.tolist() == ["a:0", "c:0"] and pooled.dialogue.tolist() == [1, 3]


def test_texts_without_labels_make_no_examples(lm, sae):
    pooled = measure(lm, HOOK, sae, ["just a text"], CONFIG).pooled
    assert len(pooled) == 0 and pooled.personas == () and pooled.n_latents == N_LATENTS
    assert pooled.dense["pre"].shape == (0, D_IN)


def test_says_what_is_wrong_before_it_starts(lm, sae):
    with pytest.raises(DataError, match="no text with a token"):
        measure(lm, HOOK, sae, [""], CONFIG)
    with pytest.raises(ModelError, match="layers"):
        measure(lm, HookPoint(9), sae, TEXTS, CONFIG)
    with pytest.raises(ModelError, match="width 3"):
        measure(lm, HOOK, SAE(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), ReLU()), TEXTS, CONFIG)
    with pytest.raises(ConfigError, match="context_size 128 is more than tiny takes: 64"):
        measure(lm, HOOK, sae, TEXTS)
    with pytest.raises(ConfigError, match="tokens is one of all, answers"):
        MeasureConfig(tokens="some")  # pyright: ignore
    with pytest.raises(ConfigError, match="at least 1, got 128, 0, 8"):
        MeasureConfig(lm_batch=0)
