import json
import warnings

import pytest
import torch

from sae_persona.errors import ConfigError, RunError
from sae_persona.studies.alarm import Alarm
from sae_persona.studies.callback import AlarmWarning, Watch, trainer_callback
from sae_persona.studies.panel import LATENTS, choose_panel
from sae_persona.studies.readings import read_prompted, read_prompts
from sae_persona.types import HookPoint

HOOK = HookPoint(0)
ALARM = Alarm.of(LATENTS, [0.5] * 19, 0.05)


@pytest.fixture
def panel(base, sae, prompt_rows):
    prompts = read_prompts(prompt_rows)
    return choose_panel(sae, HOOK, prompts, read_prompted(base, HOOK, prompts), [], [], latents={3: 1})


def push(model):
    """What a bad fine-tune would do in a step."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] += 0.05


def test_any_loop(base, panel, tmp_path):
    watch = Watch(panel, base.tokenizer, ALARM, every=2, on_alarm="stop", out=tmp_path / "log.jsonl")
    model, stopped = base.model.train(), None
    with pytest.warns(AlarmWarning, match="latents is at") as told:
        for step in range(1, 50):
            push(model)
            if watch(model, step):
                stopped = step
                break
    assert stopped is not None and stopped == watch.fired_at and stopped % 2 == 0 and len(told) == 1
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == watch.log and [line["step"] for line in lines] == list(range(2, stopped + 1, 2))
    assert all(not line["fires"] for line in lines[:-1]) and lines[-1]["scores"][LATENTS][0] > ALARM.threshold


def test_modes_are_left_as_they_were(base, panel):
    base.model.train()
    base.model.model.layers[1].eval()
    before = [module.training for module in base.model.modules()]
    Watch(panel, base.tokenizer, every=1).look(base.model, 0)
    assert [module.training for module in base.model.modules()] == before and True in before and False in before


def test_warns_once_and_goes_on(base, panel):
    watch = Watch(panel, base.tokenizer, ALARM, every=1)
    for _ in range(40):
        push(base.model)
    with pytest.warns(AlarmWarning):
        assert watch(base.model, 1) is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch(base.model, 2) is False
    assert watch.fired_at == 1


def test_in_a_trainer(base, panel, tmp_path):
    """The real Trainer, whose every step pushes: it stops early, and the model trains on in train mode."""
    import transformers

    watch = Watch(panel, base.tokenizer, ALARM, every=3, on_alarm="stop")

    class Pushing(transformers.Trainer):
        def compute_loss(self, model, *args, **kwargs):
            assert model.training, "a look before has left it in eval mode"
            push(model)
            return super().compute_loss(model, *args, **kwargs)

    ids = torch.arange(3, 13)
    rows = [{"input_ids": ids, "labels": ids} for _ in range(200)]
    base.model.requires_grad_(True)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=1, report_to=[], save_strategy="no",
        learning_rate=0.0, use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Pushing(model=base.model, args=arguments, train_dataset=rows, callbacks=[trainer_callback(watch)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    assert any(issubclass(one.category, AlarmWarning) for one in told)
    assert trainer.state.global_step == watch.fired_at < 60
    assert [line["step"] for line in watch.log] == list(range(0, trainer.state.global_step + 1, 3))


def test_bad_input(base, panel, tmp_path):
    with pytest.raises(ConfigError, match="needs an alarm"):
        Watch(panel, base.tokenizer, on_alarm="stop")
    with pytest.raises(ConfigError, match="every and batch"):
        Watch(panel, base.tokenizer, every=0)
    with pytest.raises(ConfigError, match="the panel has latents, latent 3"):
        Watch(panel, base.tokenizer, Alarm.of("means", [0.0] * 19, 0.05))
    with pytest.raises(RunError, match="cannot write"):
        Watch(panel, base.tokenizer, out=tmp_path / "no" / "log.jsonl").look(base.model, 0)
