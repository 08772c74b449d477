"""The script does what the edits do where nothing of this package can be imported."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_persona.activations.lm import padded
from sae_persona.steering.conditions import When
from sae_persona.steering.export import steer_script, steer_template
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Cap, Ceiling, Clamp, Floor, Placed, ProjectOut, Steer
from sae_persona.steering.positions import Spans
from sae_persona.types import HookPoint

ALONE = """
import sys
sys.modules["sae_persona"] = sys.modules["sae_kernels"] = None  # an import would fail
import torch, transformers
from safetensors.torch import load_file, save_file
sys.path.insert(0, sys.argv[1])
from x import steering
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])
given = load_file(sys.argv[3])
options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
with torch.no_grad(), steering(model):
    logits = model(**given).logits
    written = model.generate(**given, **options)
    uncached = model.generate(**given, use_cache=False, **options)
plain = model(**given).logits
save_file({"logits": logits, "plain": plain.detach(), "written": written, "uncached": uncached}, sys.argv[4])
"""


@pytest.fixture
def everything(lm, sae):
    """All that a script can be asked for."""
    u, v, w = torch.randn(3, lm.d_model, generator=torch.Generator().manual_seed(1))
    fires, points = When(latent=5, above=0.2, hook=HookPoint(2)), When(direction=w, above=0.1)
    edits = [
        Placed(edit=Clamp(3, 2.0, 6.0), hook=HookPoint(2), positions="all", when=fires, priority=1),
        Placed(edit=Ceiling(3, 0.5, 2.0), hook=HookPoint(2), positions="every"),
        Placed(edit=Floor(8, 1.0, 3.0), hook=HookPoint(2), positions="generated"),
        Placed(edit=Steer(u, 0.5), hook=HookPoint(1, "resid_pre"), positions=Spans(((2, 4), (6, 9))), when=points),
        Placed(edit=Cap(v, 0.3, "below"), hook=HookPoint(3), positions="prompt", when=fires),
        Placed(edit=ProjectOut(torch.stack([u, w])), hook=HookPoint(3), positions="answer"),
        Placed(edit=Steer(v, 0.5), hook=HookPoint(3), positions="pre"),
    ]
    with pytest.warns(match="pull on directions"):  # the cap and the last act at different tokens
        return Intervention.of(lm, {HookPoint(2): sae}, edits)


def test_the_script_refuses_another_model(lm, sums, tmp_path, monkeypatch):
    path = steer_script.write(sums, lm, tmp_path / "x.py")
    facts, _ = steer_template.load(path.with_suffix(".safetensors"))
    steer_template.check(lm.model.config, facts)
    other = copy.deepcopy(lm.model.config)
    other.rms_norm_eps = 0.5
    with pytest.raises(ValueError, match="the edits are for lab, and this model has another config"):
        steer_template.check(other, facts)
    monkeypatch.setattr("transformers.__version__", "0.1")  # whose configs say other things
    steer_template.check(other, facts)
    other.model_type = "mistral"
    with pytest.raises(ValueError, match="the edits are for lab, a llama, and this model is a mistral"):
        steer_template.check(other, facts)


@pytest.mark.filterwarnings("ignore:edits of")
def test_the_script_alone_does_what_the_edits_do(lm, everything, prompts, tmp_path):
    steer_script.write(everything, lm, tmp_path / "x.py")
    lm.model.save_pretrained(tmp_path / "model")
    ids, mask = padded(lm, [[1, *prompt][:20] for prompt in prompts[:4]])
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "in.safetensors")
    arguments = [tmp_path, tmp_path / "model", tmp_path / "in.safetensors", tmp_path / "out.safetensors"]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), everything.applied(lm):
        wanted = lm.model(input_ids=ids, attention_mask=mask).logits
        written = lm.model.generate(input_ids=ids, attention_mask=mask, **options)
    assert (wanted - found["plain"]).abs().max() > 0.1
    torch.testing.assert_close(found["logits"], wanted, atol=1e-5, rtol=0)
    assert torch.equal(found["written"], written) and torch.equal(found["uncached"], written)


def test_its_command_answers_before_and_after(lm, sae, tmp_path, monkeypatch, capsys):
    made = Intervention.of(lm, sae, [Clamp(3, 20.0, 6.0)], positions="answer")
    path = steer_script.write(made, lm, tmp_path / "x.py")
    assert path.read_text() == Path(steer_template.__file__).read_text()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(steer_template, "__file__", str(path))
    monkeypatch.setattr(sys, "argv", ["x.py", str(tmp_path / "model"), "what do you want ?"])
    steer_template.main()
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("before: ") and after.startswith("after:  ") and before[8:] != after[8:]


def test_nested_blocks_and_errors_leave_nothing_behind(lm, sae, tmp_path):
    made = Intervention.of(lm, sae, [Clamp(3, 20.0, 6.0)], positions="answer")
    data = steer_script.write(made, lm, tmp_path / "x.py").with_suffix(".safetensors")
    with pytest.raises(RuntimeError, match="mine"):
        with steer_template.steering(lm.model, data), steer_template.steering(lm.model, data):
            raise RuntimeError("mine")
    assert "generate" not in lm.model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_another_model_is_refused_by_the_script(lm, sae, make_lm, tmp_path):
    made = Intervention.of(lm, sae, [Clamp(3, 20.0, 6.0)], positions="answer")
    data = steer_script.write(made, lm, tmp_path / "x.py").with_suffix(".safetensors")
    with pytest.raises(ValueError, match="the edits are for lab, this model has other sizes"):
        with steer_template.steering(make_lm("Qwen2").model, data):
            pass


def test_what_is_lost_stands_in_the_header(lm, sae, prompts, tmp_path):
    from sae_persona.steering.export.approximate import approximate

    made = approximate(Intervention.of(lm, sae, [Clamp(3, 20.0, 6.0)]), lm, prompts[:2], prompts[2:4])
    data = steer_script.write(made, lm, tmp_path / "x.py").with_suffix(".safetensors")
    facts, _ = steer_template.load(data)
    assert facts["approximation"] == json.loads(json.dumps(made.approximation))
