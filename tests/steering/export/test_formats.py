"""What the formats of other tools hold does what the edits do, and what they cannot say is refused."""

import pytest
import torch

from sae_persona.errors import ConfigError, ModelError
from sae_persona.steering.conditions import When
from sae_persona.steering.export.approximate import approximate
from sae_persona.steering.export.formats import FORMATS, write_as
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.interventions import Ablate, Add, Cap, Clamp, Pin, Placed, ProjectOut, Scale, Steer
from sae_persona.steering.positions import Spans
from sae_persona.types import HookPoint

ADDS = ("gguf", "lm-eval", "peft", "peft-lora", "baked", "neuronpedia")
EVERYWHERE = (*ADDS, "vllm", "nnsight")
HOOK = HookPoint(2)


def path_of(folder, name):
    return folder / f"x{FORMATS[name].suffix}"


@pytest.mark.parametrize("name", FORMATS)
def test_each_writes_what_it_says_it_writes(lm, one_sum, tmp_path, name):
    path = path_of(tmp_path, name)
    assert write_as(name, one_sum, lm, path) == path
    assert sorted(tmp_path.iterdir()) == sorted(FORMATS[name].files(path))


@pytest.mark.parametrize("name", ADDS)
@pytest.mark.parametrize("edit", [Clamp(3, 1.0, 4.0), Scale(3, 2.0), Ablate(3), Cap(torch.ones(128), 1.0, "below")])
def test_what_is_no_sum_is_refused(lm, sae, tmp_path, name, edit):
    made = Intervention.of(lm, sae, [edit], positions="every")
    with pytest.raises(ConfigError, match="can only add, and what the .* adds depends on the stream"):
        write_as(name, made, lm, path_of(tmp_path, name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", EVERYWHERE)
def test_some_tokens_only_are_refused(lm, sae, tmp_path, name):
    for positions in ("answer", "all", Spans(((1, 3),))):
        made = Intervention.of(lm, sae, [Add(3, 1.0, 4.0)], positions=positions)
        with pytest.raises(ConfigError, match=f"every token, BOS too, and the add of latent 3 acts at {positions}"):
            write_as(name, made, lm, path_of(tmp_path, name))
    waits = Placed(edit=Add(3, 1.0, 4.0), positions="every", when=When(latent=5, above=0.1))
    with pytest.raises(ConfigError, match="knows no conditions, and the add of latent 3 waits for one"):
        write_as(name, Intervention.of(lm, sae, [waits]), lm, path_of(tmp_path, name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["steer-py", "nnsight", "vllm"])
def test_what_needs_the_whole_encoder_is_refused(lm, topk_sae, tmp_path, name):
    made = Intervention.of(lm, topk_sae, [Clamp(3, 1.0, 4.0)], positions="every")
    with pytest.raises(ConfigError, match="depend on all others"):
        write_as(name, made, lm, path_of(tmp_path, name))


def test_an_added_latent_is_a_sum_under_topk_too(lm, topk_sae, edited, tmp_path):
    from sae_persona.steering.export.importing import import_intervention

    made = Intervention.of(lm, topk_sae, [Add(3, 1.0, 4.0)], positions="every")
    path = write_as("gguf", made, lm, tmp_path / "x.gguf")
    torch.testing.assert_close(edited(lm, import_intervention(path, lm)), edited(lm, made), atol=1e-5, rtol=0)


def test_formats_say_where_they_cannot_act(lm, sae, tmp_path):
    direction = torch.ones(lm.d_model)

    def at(*hooks):
        return Intervention.of(lm, None, [Placed(edit=Steer(direction, 1.0), hook=h, positions="every") for h in hooks])

    first, zeroth, second = HookPoint(0, "resid_pre"), HookPoint(0), HookPoint(2)
    for name, made, message in (
        ("gguf", at(zeroth), "acts after layer 1 at the earliest, got 0"),
        ("lm-eval", at(first), "not on what enters the first"),
        ("lm-eval", at(zeroth, second), "can add at one layer, got 2"),
        ("peft", at(first), "not to what enters the first"),
        ("baked", at(first, second), "not both"),
        ("neuronpedia", at(zeroth, second), "holds one vector, and the edits act at 2 layers"),
        ("nnsight", at(first), "not what enters the first"),
        ("saelens", at(second), "lists latents and their lines"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_as(name, made, lm, path_of(tmp_path, name))
    solved = Intervention.of(lm, sae, [Pin(3, 1.0, 4.0)], positions="every")
    for name in ("steer-py", "nnsight", "saelens"):
        with pytest.raises(ConfigError, match="pin"):
            write_as(name, solved, lm, path_of(tmp_path, name))
    turn = Placed(edit=Clamp(3, 1.0, 4.0), when=When(latent=5, above=0.1, scope="turn"))
    with pytest.raises(ConfigError, match="not in a turn"):
        write_as("steer-py", Intervention.of(lm, sae, [turn]), lm, tmp_path / "x.py")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted({*FORMATS} - {"saelens"}))
def test_what_an_approximation_loses_is_written_into_the_file(lm, sae, prompts, tmp_path, name):
    made = approximate(Intervention.of(lm, sae, [Clamp(3, 20.0, 6.0)]), lm, prompts[:2], prompts[2:4])
    path = write_as(name, made, lm, path_of(tmp_path, name))
    files = [file for one in FORMATS[name].files(path) for file in (one.iterdir() if one.is_dir() else [one])]
    if name == "lm-eval":
        (entry,) = torch.load(path, weights_only=True).values()
        assert entry["approximation"] == made.approximation
    else:
        assert any(b"clamp at answer" in file.read_bytes() for file in files)


def test_names_suffixes_and_models_are_checked(lm, one_sum, make_lm, tmp_path):
    with pytest.raises(ConfigError, match="a format is one of native, steer-py, gguf"):
        write_as("onnx", one_sum, lm, tmp_path / "x.onnx")
    with pytest.raises(ConfigError, match=r"a gguf file ends in \.gguf, got x.bin"):
        write_as("gguf", one_sum, lm, tmp_path / "x.bin")
    with pytest.raises(ModelError, match="is for width 128, tiny-GPT2 has 32"):
        write_as("gguf", one_sum, make_lm("GPT2"), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_an_intervention_needs_edits(lm, sae):
    with pytest.raises(ConfigError, match="needs at least one edit"):
        Intervention.of(lm, sae, [])
    with pytest.raises(ConfigError, match="latent 40 does not exist"):
        Intervention.of(lm, sae, [Ablate(40)])
    assert Intervention.of(lm, None, [ProjectOut(torch.ones(lm.d_model))], hook=HOOK).hooks == [HOOK]
