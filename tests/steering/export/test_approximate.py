import pytest
import torch

from sae_persona.activations.hooks import model_inputs, read
from sae_persona.activations.lm import padded
from sae_persona.errors import DataError
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.export.approximate import ApproximateConfig, approximate
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Add, Ceiling, Clamp, Steer

SHORT = ApproximateConfig(max_new_tokens=6)


def test_the_direction_is_the_mean_of_what_a_clamp_adds(lm, sae, prompts):
    """At positions pre there is one token a prompt, so the mean can be had from the unedited stream."""
    made = approximate(
        Intervention.of(lm, sae, [Clamp(3, 2.0, 6.0)], positions="pre"), lm, prompts[:5], prompts[5:], SHORT
    )
    ids, mask = padded(lm, prompts[:5])
    x = read(lm, [sae.hook], ids, mask)[sae.hook][:, -1]
    delta = (12.0 - sae.latents_at(x, torch.tensor([3]))) * sae.w_dec[3]
    (one,) = made.edits
    assert isinstance(one.edit, Steer)
    assert (one.hook, one.positions) == (sae.hook, "every")
    torch.testing.assert_close(one.edit.strength * one.edit.direction, delta.mean(dim=0), atol=1e-5, rtol=0)
    explained = 1 - (delta - delta.mean(dim=0)).square().sum() / delta.square().sum()
    assert made.approximation is not None
    assert made.approximation["explained"] == pytest.approx(float(explained), abs=1e-5)
    assert made.approximation["stands_for"] == ["clamp at pre"]


def test_the_kl_is_that_of_the_next_tokens_on_held_out_answers(lm, sae, prompts):
    true = Intervention.of(lm, sae, [Clamp(3, 2.0, 6.0)], positions="answer")
    made = approximate(true, lm, prompts[:5], prompts[5:6], SHORT)
    greedy = AnswerConfig(temperature=0.0, max_new_tokens=6)
    with true.applied(lm):
        (written,) = answer(lm, prompts[5:6], greedy)
    whole, n = prompts[5] + written.ids, len(prompts[5])
    inputs = model_inputs(lm, *padded(lm, [whole]))

    def log_p(which):
        if which is None:
            return lm.model(**inputs).logits[0, n - 1 : -1].log_softmax(-1)
        with which.applied(lm, prompt_lengths=[n]):
            return lm.model(**inputs).logits[0, n - 1 : -1].log_softmax(-1)

    wanted, found = log_p(true), made.approximation
    for name, other in (("kl", log_p(made)), ("kl_plain", log_p(None))):
        kl = torch.nn.functional.kl_div(other, wanted, log_target=True, reduction="batchmean")
        assert found[name] == pytest.approx(float(kl), rel=1e-3, abs=1e-5)
    assert found["held_out_tokens"] == len(written.ids)


def test_a_sum_loses_nothing(lm, sae, prompts):
    true = Intervention.of(lm, sae, [Add(3, 1.5, 4.0)], positions="every")
    found = approximate(true, lm, prompts[:3], prompts[3:5], SHORT).approximation
    assert found["explained"] == pytest.approx(1.0, abs=1e-6)
    assert abs(found["kl"]) < 1e-6 < found["kl_plain"]


def test_prompts_on_which_nothing_happens_are_refused(lm, sae, prompts):
    made = Intervention.of(lm, sae, [Ceiling(3, 100.0, 100.0)], positions="prompt")
    with pytest.raises(DataError, match="change nothing on these prompts"):
        approximate(made, lm, prompts[:1], prompts[1:2], SHORT)
    with pytest.raises(DataError, match="needs prompts and others held out, got 0 and 1"):
        approximate(made, lm, [], prompts[1:2], SHORT)
