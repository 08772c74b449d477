import pytest
import torch

from sae_persona.errors import ConfigError, FormatError
from sae_persona.steering.export import lm_eval_file
from sae_persona.steering.export.importing import import_intervention
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Placed, ProjectionClamp, ProjectOut, Steer
from sae_persona.types import HookPoint

U, V, W = torch.randn(3, 128, generator=torch.Generator().manual_seed(2))


def harness(lm, path):
    """Hooks as ``steered`` makes them: its additions read the loop's variables when they run, after the last entry."""
    made = {}
    for module, entry in torch.load(path, weights_only=True).items():
        amount, vector, bias = entry["steering_coefficient"], entry["steering_vector"], entry["bias"]
        if entry["action"] == "add":
            made[module] = lambda acts: acts + amount * vector  # noqa: B023 - as there
        else:
            made[module] = lambda acts, v=vector, value=amount: clamped(acts, v, value)
        assert bias is None
    modules = dict(lm.model.base_model.named_modules())
    return [modules[m].register_forward_hook(lambda _, args, out, f=f: f(out)) for m, f in made.items()]


def clamped(acts, vector, value):
    unit = vector / vector.norm()
    return acts + (value - acts @ unit)[..., None] * unit


def under_harness(lm, path, logits):
    handles = harness(lm, path)
    try:
        return logits(lm)
    finally:
        for handle in handles:
            handle.remove()


def edits(lm, *pairs):
    return Intervention.of(lm, None, [Placed(edit=e, hook=HookPoint(n), positions="every") for n, e in pairs])


def test_an_addition_and_clamped_projections_are_those_of_the_edits(lm, edited, logits, tmp_path):
    made = edits(lm, (3, Steer(U, 0.5)), (1, ProjectionClamp(V, 2.0)), (2, ProjectOut(W)))
    path = lm_eval_file.write(made, lm, tmp_path / "x.pt")
    torch.testing.assert_close(under_harness(lm, path, logits), edited(lm, made), atol=1e-5, rtol=0)
    torch.testing.assert_close(edited(lm, import_intervention(path, lm)), edited(lm, made), atol=1e-5, rtol=0)


def test_latents_that_are_added(lm, one_sum, edited, logits, tmp_path):
    path = lm_eval_file.write(one_sum, lm, tmp_path / "x.pt")
    torch.testing.assert_close(under_harness(lm, path, logits), edited(lm, one_sum), atol=1e-5, rtol=0)
    torch.testing.assert_close(edited(lm, import_intervention(path, lm)), edited(lm, one_sum), atol=1e-5, rtol=0)


def test_what_its_two_actions_cannot_say_is_refused(lm, tmp_path):
    for made, message in (
        (edits(lm, (1, ProjectOut(V)), (1, Steer(U, 1.0))), "one action a layer"),
        (edits(lm, (1, ProjectOut(torch.stack([V, U])))), "projects out one direction a layer, got 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            lm_eval_file.write(made, lm, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save([{"hookpoint": "layers.1"}], path)
    with pytest.raises(FormatError, match="is not an lm-eval steered file"):
        lm_eval_file.read(path)
    torch.save({"layers.1": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(FormatError, match="code is not read"):
        lm_eval_file.read(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FormatError, match="no file of plain tensors"):
        lm_eval_file.read(path)


def test_the_harness_itself_agrees(lm, one_sum, edited, logits, tmp_path):
    steered = pytest.importorskip("lm_eval.models.hf_steered")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    path = lm_eval_file.write(one_sum, lm, tmp_path / "x.pt")
    theirs = steered.SteeredModel(pretrained=str(tmp_path / "model"), steer_path=str(path), device="cpu")
    torch.testing.assert_close(logits(lm, theirs.forward), edited(lm, one_sum), atol=1e-5, rtol=0)
