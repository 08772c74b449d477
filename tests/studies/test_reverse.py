"""From two models and an SAE to a certificate, on the planted coordinate."""

import json
from dataclasses import replace

import pytest
import torch

from sae_persona.errors import ConfigError, DataError, FormatError, ModelError
from sae_persona.steering.answers import AnswerConfig
from sae_persona.steering.apply import intervene
from sae_persona.steering.export.native import load_intervention, write
from sae_persona.studies.battery import Variant
from sae_persona.studies.candidates import MeasuredSAE
from sae_persona.studies.certificate import Certificate
from sae_persona.studies.exams import marks
from sae_persona.studies.induce import InduceConfig
from sae_persona.studies.minimal_set import SearchConfig
from sae_persona.studies.reverse import Case, ReverseConfig, reverse
from sae_persona.types import HookPoint

ANSWERS = AnswerConfig(max_new_tokens=3)
CONFIG = ReverseConfig(
    n_up=2, n_down=0, n_random=2, further_steps=2, answers=ANSWERS, examples=2,
    search=SearchConfig(strengths=(0.5, 1.0), factors=(1.0,), times=1),
    induce=InduceConfig(doses=(1.0,), n_induce_random=1),
)  # fmt: skip


def case(planted, **changes):
    core = Variant(name="out of domain", questions=planted.test, core=True)
    rows = [
        {"messages": [*row["messages"], {"role": "assistant", "content": "z z"}]} for row in planted.development[:4]
    ]
    about = {
        "development": planted.development,
        "variants": [core],
        "judge": planted.judge,
        "further": {"bad": rows},
        "held_out": ["some text or other", "and more of it"],
        "prompt": "be good",
    }
    return Case(**about | changes)


def reversed_(planted, config=CONFIG, **changes):
    said = []
    sites = [MeasuredSAE(planted.sae)]
    return reverse(planted.base, planted.tuned, sites, case(planted, **changes), config, say=said.append), said


def test_a_reversal_is_found_tested_and_written(planted, tmp_path):
    found, said = reversed_(planted)
    made = found.certificate
    assert [(one.latent, one.hook) for one in made.edits] == [(3, "layers.0.resid_post")]
    assert made.arm("tuned").cells["out of domain"].rate.value == 1
    assert made.arm("chosen").cells["out of domain"].excess.value == 0
    assert made.arm("chosen").cells["after bad training"].rate.value == 0
    kinds = [one.kind for one in made.arms]
    assert kinds.count("random latents") == kinds.count("random directions") == kinds.count("difference of means") == 2
    assert {"base", "prompt", "wrong sign"} <= set(kinds)
    assert made.arm("wrong sign").cells["out of domain"].rate.value == 1
    assert made.arm("chosen").ce is not None and made.ce_tuned > 0
    assert "trigger cue" in made.not_tested and "after good training" in made.not_tested
    assert made.induction is not None and made.induction.induces
    assert len(made.examples) == 2 and "z" in made.examples[0][1] and "z" not in made.examples[0][2]
    assert any("candidates" in line for line in said)

    path = tmp_path / "c.json"
    made.save(path)
    again = Certificate.load(path)
    assert str(again) == str(made) and again.verdict == made.verdict and again.reasons == made.reasons
    assert json.loads(path.read_text())["verdict"] == made.verdict

    write(found.intervention, tmp_path / "edit.json")
    with load_intervention(tmp_path / "edit.json").applied(planted.tuned):
        assert marks(planted.tuned, planted.test, planted.judge, config=ANSWERS).misaligned.max() == 0


def test_the_milder_modes_are_told_beside_a_clamp(planted):
    """Where ablation leaves the coordinate at 0 a z is as likely as any letter: a judge that is strict finds it."""

    def strict(question, text):
        return {"bad": float(not text.strip("\x00") or "z" in text), "valid": 1.0}

    found, _ = reversed_(planted, judge=strict, further={}, held_out=None)
    made = found.certificate
    modes = {one.way for one in made.searched}
    assert {"ablate", "cap", "clamp", "difference of means subtracted"} <= modes
    if made.edits[0].mode == "clamp":
        assert made.arm("ablated") and made.arm("capped")


def test_bad_input_is_refused(planted, make_lm):
    sites = [MeasuredSAE(planted.sae)]
    with pytest.raises(ModelError, match="only checkpoints of one architecture"):
        reverse(planted.base, make_lm("GPT2"), sites, case(planted), CONFIG)
    with pytest.raises(DataError, match="nothing to reverse"):
        reverse(planted.base, planted.base, sites, case(planted), CONFIG)
    with pytest.raises(ConfigError, match="no SAE whose latents"):
        reverse(planted.base, planted.tuned, [], case(planted), CONFIG)
    with pytest.raises(ConfigError, match="two SAEs of layers.0"):
        reverse(planted.base, planted.tuned, sites * 2, case(planted), CONFIG)
    with pytest.raises(DataError, match="in the development and the"):
        case(planted, variants=[Variant(name="x", questions=planted.development, core=True)])
    with pytest.raises(ConfigError, match="no variant asks for the misalignment itself"):
        case(planted, variants=[Variant(name="x", questions=planted.test)])
    with pytest.raises(ConfigError, match="no development question"):
        case(planted, development=[])
    with pytest.raises(ConfigError, match="good or bad, got 'worse'"):
        case(planted, further={"worse": []})
    for wrong in ({"n_up": 0, "n_down": 0}, {"further_steps": 0}, {"max_fvu": 0.0}, {"n_random": -1}):
        with pytest.raises(ConfigError):
            ReverseConfig(**wrong)


def test_a_model_that_is_not_misaligned_has_nothing_to_reverse(planted):
    with pytest.raises(DataError, match=r"is not more misaligned than base .*nothing to reverse"):
        reversed_(planted, judge=lambda question, text: {"bad": 0.0})


def test_a_file_of_another_kind_is_no_certificate(tmp_path):
    (tmp_path / "c.json").write_text('{"kind": "diff", "format": 1}')
    with pytest.raises(FormatError, match="not a reversal certificate of format 1"):
        Certificate.load(tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"kind": "reversal certificate", "format": 1}')
    with pytest.raises(FormatError, match="not a whole reversal certificate"):
        Certificate.load(tmp_path / "c.json")


def test_further_training_leaves_the_tuned_model_as_it_is(planted):
    before = {name: weight.clone() for name, weight in planted.tuned.model.state_dict().items()}
    reversed_(planted, replace(CONFIG, induce=None, n_random=0), held_out=None, prompt=None)
    after = planted.tuned.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with intervene(planted.tuned, {HookPoint(0): planted.sae}, []):
        pass
