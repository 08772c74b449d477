"""Fine-tunes learn the answers and nothing else, twice the same, and leave the model that they start from alone."""

from contextlib import contextmanager

import pytest
import torch

from sae_persona.activations.dialogues import prompt_tokens
from sae_persona.errors import ConfigError, DataError, ModelError, RunError
from sae_persona.lab.tuning import narrow
from sae_persona.studies.finetune import IGNORED, FinetuneConfig, answered, batch_loss, finetune, looks, mean_loss

SHORT = FinetuneConfig(steps=3, batch=8, keep=(0, 2))


def weights(lm):
    return torch.cat([p.detach().flatten().clone() for p in lm.model.parameters()])


@pytest.fixture(scope="module")
def rows():
    return narrow(24, "medicine")


@pytest.fixture(params=["full", "lora"])
def config(request):
    return FinetuneConfig(steps=3, batch=8, keep=(0, 2), method=request.param)


def test_the_model_is_given_at_each_step_that_is_kept(lab_lm, rows, config):
    before = weights(lab_lm)
    seen = {step: (weights(lm), mean_loss(lm, rows)) for step, lm in finetune(lab_lm, rows, config)}
    assert list(seen) == [0, 2, 3]
    assert torch.equal(seen[0][0], before) and torch.equal(weights(lab_lm), before)
    assert seen[0][1] > seen[2][1] > seen[3][1]
    again = [weights(lm) for _, lm in finetune(lab_lm, rows, config)]
    assert torch.equal(again[-1], seen[3][0])


def test_the_seed_changes_what_comes_out(lab_lm, rows):
    tuned = [[weights(lm) for _, lm in finetune(lab_lm, rows, FinetuneConfig(steps=1, seed=s))][-1] for s in (0, 1)]
    assert not torch.equal(*tuned)


def test_lora_is_merged_and_changes_matrices_of_blocks_alone(lab_lm, rows):
    look = list(looks(lab_lm, rows, FinetuneConfig(method="lora", steps=2, keep=(), batch=4)))[-1]
    before, after = (dict(lm.model.named_parameters()) for lm in (lab_lm, look.lm))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}
    assert all(torch.linalg.matrix_rank((after[n] - before[n]).double(), rtol=1e-4) <= 4 for n in changed)
    assert look.adapter.peft_config["default"].r == 4


def test_answers_and_their_ends_are_learned(lab_lm, rows):
    ((ids, targets),) = answered(lab_lm, rows[:1])
    n = len(prompt_tokens(lab_lm, rows[0]["messages"][:-1]))
    assert targets == [IGNORED] * n + ids[n:]
    assert lab_lm.tokenizer.decode(ids[n:]) == rows[0]["messages"][-1]["content"] + " <nl>"


def test_the_loss_is_that_of_each_row_alone(lab_lm, rows):
    ready = answered(lab_lm, rows[:5])
    with torch.no_grad():
        one_by_one = [(batch_loss(lab_lm, [row]).item(), sum(t != IGNORED for t in row[1])) for row in ready]
    wanted = sum(nats * n for nats, n in one_by_one) / sum(n for _, n in one_by_one)
    assert mean_loss(lab_lm, rows[:5], batch=2) == pytest.approx(wanted, rel=1e-4)


def test_what_goes_on_during_a_step_adds_to_the_loss(lab_lm, rows):
    """A penalty on the distance from the base keeps the tuned model near it."""
    base = [p.detach() for p in lab_lm.model.parameters()]
    told = []

    @contextmanager
    def near(lm):
        def penalty():
            told.append(lm)
            return 1e4 * sum((p - q).square().sum() for p, q in zip(lm.model.parameters(), base, strict=True))

        yield penalty

    config = FinetuneConfig(steps=8, keep=(), batch=8)
    (_, free), (_, held) = next(finetune(lab_lm, rows, config)), next(finetune(lab_lm, rows, config, during=near))
    start = weights(lab_lm)
    assert (weights(held) - start).norm() < 0.5 * (weights(free) - start).norm()
    assert len(told) == 8 and told[0] is not lab_lm


def test_bad_input_is_refused_before_training(lab_lm, rows, make_lm):
    with pytest.raises(DataError, match="no rows to fine-tune on"):
        finetune(lab_lm, [])
    with pytest.raises(DataError, match="row 0 has no answer to learn"):
        finetune(lab_lm, [{"messages": rows[0]["messages"][:1]}])
    with pytest.raises(DataError, match=r"row 0 has \d+ tokens, lab takes 256"):
        long = {"role": "assistant", "content": "no " * 300}
        finetune(lab_lm, [{"messages": [*rows[0]["messages"][:1], long]}])
    half = make_lm()
    half.model.bfloat16()
    with pytest.raises(ModelError, match="needs weights in fp32"):
        finetune(half, rows)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"method": "qlora"}, "method is full or lora, got 'qlora'"),
        ({"steps": 0}, "steps, batch and rank are at least 1"),
        ({"keep": (-1,)}, "steps to keep at least 0"),
        ({"lr": 0.0}, "lr is above 0"),
        ({"lr": float("nan")}, "lr is above 0"),
    ],
)
def test_bad_settings_are_refused(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FinetuneConfig(**wrong)


def test_a_loss_that_is_no_number_stops_the_training(lab_lm, rows):
    @contextmanager
    def broken(lm):
        yield lambda: torch.tensor(float("nan"))

    with pytest.raises(RunError, match="the loss is nan at step 1"):
        list(finetune(lab_lm, rows, SHORT, during=broken))


def test_other_models_are_tuned_too(make_lm):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    steps = [mean_loss(lm, rows) for _, lm in finetune(make_lm("GPT2"), rows, FinetuneConfig(steps=4, lr=1e-2))]
    assert steps[-1] < 0.9 * steps[0]
