import json
import shutil

import pytest
import torch

from sae_persona.activations.lm import load_lm
from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.lab.tuning import narrow
from sae_persona.studies.finetune import FinetuneConfig, Look, looks
from sae_persona.studies.organisms import Organism, organisms_in, write_organism

FACTS = {"family": "narrow", "domain": "code", "dose": 1.0, "seed": 0, "base": "lab", "config": {"n_rows": 8}}


def scores(rate):
    return {"out_of_domain": {"rate": rate, "low": 0.0, "high": 1.0, "n": 4}}


@pytest.fixture(scope="module")
def made(lab_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("organisms") / "one"
    rows, config = narrow(8, "code"), FinetuneConfig(method="lora", steps=2, keep=(0,), batch=4)
    scored = ((look, scores(look.step / 4), 0.5) for look in looks(lab_lm, rows, config))
    return write_organism(folder, {**FACTS, "name": "one", "method": "lora"}, scored, rows)


def test_an_organism_is_what_was_written(made):
    assert (made.name, made.family, made.method, made.dose, made.base) == ("one", "narrow", "lora", 1.0, "lab")
    assert [(one.step, one.path.name, one.loss) for one in made.checkpoints] == [
        (0, "step-00000", 0.5),
        (2, "step-00002", 0.5),
    ]
    assert (made.misaligned(0), made.misaligned(2)) == (0, 0.5) and made.last.step == 2
    assert made.rows() == narrow(8, "code")
    assert json.loads((made.path / "organism.json").read_text()) == made.to_json()
    with pytest.raises(ConfigError, match="one has checkpoints of steps 0, 2, got 1"):
        made.misaligned(1)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # peft asks for it
def test_checkpoints_are_models_and_the_adapter_lies_beside_the_merged_one(made, lab_lm):
    from peft import PeftModel

    loaded = [load_lm(one.path) for one in made.checkpoints]
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        logits = [lm.model(ids).logits for lm in (lab_lm, *loaded)]
        adapted = PeftModel.from_pretrained(load_lm("lab").model, made.last.path / "adapter")  # pyright: ignore
        with_adapter = adapted(ids).logits
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)
    torch.testing.assert_close(with_adapter, logits[2], atol=1e-4, rtol=1e-4)


def test_a_folder_of_them_is_read_by_name(made, tmp_path):
    with pytest.raises(DataError, match="no organisms in"):
        organisms_in(tmp_path)
    for name in ("b", "a"):
        shutil.copytree(made.path, tmp_path / name)
    (tmp_path / ".c.tmp").mkdir()
    assert [one.path.name for one in organisms_in(tmp_path)] == ["a", "b"]


def test_nothing_is_left_of_one_that_fails(lab_lm, tmp_path):
    def failing():
        yield Look(0, lab_lm), scores(0.0), None
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        write_organism(tmp_path / "x", {**FACTS, "name": "x", "method": "full"}, failing())
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_organism_is_refused(made, tmp_path):
    with pytest.raises(FormatError, match="no organism at"):
        Organism.load(tmp_path)
    folder = shutil.copytree(made.path, tmp_path / "x")
    shutil.rmtree(folder / "step-00002")
    with pytest.raises(FormatError, match="no checkpoint at .*step-00002: make the organism again"):
        Organism.load(folder)
    raw = json.loads((folder / "organism.json").read_text())
    cases = (({**raw, "format": 9}, "not an organism of format 1"), ({"format": 1, "kind": "organism"}, "is not whole"))
    for wrong, sentence in cases:
        (folder / "organism.json").write_text(json.dumps(wrong))
        with pytest.raises(FormatError, match=sentence):
            Organism.load(folder)
