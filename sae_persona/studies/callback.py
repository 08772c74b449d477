"""Watch a fine-tune while it runs: the panel every so many steps, with a warning or an end when the alarm fires.

For a Hugging Face ``Trainer``:           Trainer(..., callbacks=[trainer_callback(watch)])
For any other loop, after each step:      if watch(model, step): break
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from sae_persona.activations.lm import wrap_lm
from sae_persona.attribution.association import Interval
from sae_persona.errors import ConfigError, RunError
from sae_persona.studies.alarm import Alarm
from sae_persona.studies.panel import Panel

if TYPE_CHECKING:
    from transformers import TrainerCallback

OnAlarm = Literal["warn", "stop"]


class AlarmWarning(UserWarning):
    """The panel's score has crossed the alarm's threshold."""


@dataclass
class Watch:
    """A panel over a fine-tune that is under way. Its state is the log alone.

    panel, tokenizer   the tokenizer of the model that is tuned
    alarm     None: scores are logged, and nothing fires
    every     steps between two looks, each of which costs one short forward pass a prompt
    on_alarm  warn: an AlarmWarning the first time; stop: that, and training ends
    out       a .jsonl to which each look is appended, or None
    """

    panel: Panel
    tokenizer: Any
    alarm: Alarm | None = None
    every: int = 10
    on_alarm: OnAlarm = "warn"
    out: Path | None = None
    batch: int = 32
    on_look: Callable[[dict[str, Any]], None] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if min(self.every, self.batch) < 1 or self.on_alarm not in get_args(OnAlarm):
            raise ConfigError(
                "every and batch are at least 1 and on_alarm is warn or stop, "
                f"got {self.every}, {self.batch}, {self.on_alarm!r}"
            )
        if self.alarm is None and self.on_alarm == "stop":
            raise ConfigError("a watch that stops needs an alarm: set one on benign fine-tunes")
        if self.alarm is not None and self.alarm.measure not in self.panel.measures:
            raise ConfigError(f"the alarm is on {self.alarm.measure!r}, the panel has {', '.join(self.panel.measures)}")

    @property
    def fired_at(self) -> int | None:
        """The first step at which the alarm fired."""
        return next((line["step"] for line in self.log if line["fires"]), None)

    def __call__(self, model: nn.Module, step: int) -> bool:
        """Look, if it is time to; True if training is to end. The model is left in the mode that it was in."""
        if step % self.every:
            return False
        self.look(model, step)
        return self.on_alarm == "stop" and self.fired_at is not None

    def look(self, model: nn.Module, step: int) -> dict[str, Interval]:
        """Score the model now. Errors as ``Panel.score``; RunError if the log cannot be written."""
        modes = [(module, module.training) for module in model.modules()]
        try:
            lm = wrap_lm(model, self.tokenizer, name=f"step {step}")
            scores = self.panel.score(lm, batch=self.batch)
        finally:
            for module, mode in modes:
                module.training = mode
        fires = self.alarm is not None and self.alarm.fires(scores[self.alarm.measure].value)
        first = fires and self.fired_at is None
        self._keep({"step": step, "scores": {name: list(score) for name, score in scores.items()}, "fires": fires})
        if first and self.alarm is not None:
            score = scores[self.alarm.measure].value
            warnings.warn(
                AlarmWarning(
                    f"step {step}: {self.alarm.measure} is at {score:+.2f}, above {self.alarm.threshold:+.2f}"
                ),
                stacklevel=2,
            )
        return scores

    def _keep(self, line: dict[str, Any]) -> None:
        self.log.append(line)
        if self.on_look is not None:
            self.on_look(line)
        if self.out is None:
            return
        try:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.out}: {error.strerror}. Choose another place, or none") from error


def trainer_callback(watch: Watch) -> "TrainerCallback":
    """The watch as a callback of a Hugging Face ``Trainer``: it looks before the first step and after every N-th.

    On several processes the main one looks; if it says stop, all of them stop, which a broadcast sees to.
    """
    from transformers import TrainerCallback  # here: transformers is slow to import

    class PanelCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._look(state, control, kwargs["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._look(state, control, kwargs["model"])

        def _look(self, state: Any, control: Any, model: nn.Module) -> None:
            stop = watch(model, state.global_step) if state.is_world_process_zero else False
            if _agreed(stop, model):
                control.should_training_stop = True

    return PanelCallback()


def _agreed(stop: bool, model: nn.Module) -> bool:
    """What the first process says, on all of them."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return stop
    import torch

    said = torch.tensor([int(stop)], device=next(model.parameters()).device)
    dist.broadcast(said, 0)
    return bool(said.item())
