import json
import math
import random

import pytest
import torch

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError, FormatError, ModelError, SaePersonaError
from sae_persona.steering.apply import intervene
from sae_persona.steering.conditions import When
from sae_persona.steering.export import control_vector, lm_eval_file, native
from sae_persona.steering.export.importing import import_intervention
from sae_persona.steering.interventions import Clamp, Placed, ProjectionClamp, ProjectOut, Steer
from sae_persona.types import HookPoint


def test_control_vectors_are_added_after_their_layers(lm, sums, edited, logits, tmp_path):
    path = control_vector.write(sums, lm, tmp_path / "x.gguf")
    found = import_intervention(path, lm)
    assert found.hooks == [HookPoint(2), HookPoint(3)]
    torch.testing.assert_close(edited(lm, found), edited(lm, sums), atol=1e-5, rtol=0)
    opposite = import_intervention(path, lm, strength=-1.0)
    assert opposite.edits[0].edit.strength == -1.0
    assert not torch.allclose(edited(lm, opposite), edited(lm, found), atol=0.01)


@pytest.mark.parametrize("extra", [0, 1])
def test_persona_vectors_are_rows_by_layer_the_embeddings_first(lm, edited, tmp_path, extra):
    rows = torch.randn(lm.n_layers + extra, lm.d_model, generator=torch.Generator().manual_seed(9))
    torch.save(rows, tmp_path / "evil.pt")
    found = import_intervention(tmp_path / "evil.pt", lm, layer=2, strength=0.5, positions="answer")
    (one,) = found.edits
    assert (one.hook, one.positions, one.edit.strength) == (HookPoint(2), "answer", 0.5)
    assert torch.equal(one.edit.direction, rows[2 + extra])


def test_a_bias_of_lm_eval_moves_where_the_projection_is_set(lm, edited, logits, tmp_path):
    v, bias = torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(10))
    entry = {"action": "clamp", "steering_vector": v, "steering_coefficient": 2.0, "bias": bias}
    torch.save({"layers.2": entry}, tmp_path / "x.pt")
    unit = v / v.norm()

    def harness(_, args, out):
        x = out - bias
        return x - (x @ unit)[..., None] * unit + unit * 2.0 + bias

    handle = lm.blocks[2].register_forward_hook(harness)
    try:
        wanted = logits(lm)
    finally:
        handle.remove()
    torch.testing.assert_close(edited(lm, import_intervention(tmp_path / "x.pt", lm)), wanted, atol=1e-5, rtol=0)


def test_our_own_files_keep_their_places(lm, sae, prompts, tmp_path):
    edits = [Clamp(3, 2.0, 6.0), Placed(edit=ProjectionClamp(torch.ones(lm.d_model), 1.0), hook=HookPoint(4))]
    path = native.export(tmp_path / "x.json", lm, sae, edits, positions="pre")
    found = import_intervention(path, lm)
    assert [(one.hook, one.positions) for one in found.edits] == [(HookPoint(2), "pre"), (HookPoint(4), "answer")]
    for given in ({"layer": 2}, {"strength": 2.0}, {"positions": "all"}):
        with pytest.raises(ConfigError, match="has its own layers, strengths and positions"):
            import_intervention(path, lm, **given)
    with intervene(lm, sae, edits, positions="pre"), found.applied(lm):
        pass  # they nest


def test_files_that_do_not_fit_are_refused_before_the_model_runs(lm, sae, sums, make_lm, tmp_path):
    ran = []
    handle = lm.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    vectors, other = torch.zeros(6, lm.d_model), make_lm("Qwen2")
    for name, content in (
        ("vectors.pt", vectors),
        ("tall.pt", torch.ones(9, lm.d_model)),
        ("nan.pt", torch.full((6, lm.d_model), torch.nan)),
        ("words.pt", {"a": "b"}),
        ("there.pt", {"lm_head": {"action": "add", "steering_vector": torch.ones(128), "steering_coefficient": 1.0,
                                  "bias": None}}),
    ):  # fmt: skip
        torch.save(content, tmp_path / name)
    gguf, ours = tmp_path / "x.gguf", tmp_path / "x.json"
    control_vector.write(sums, lm, gguf)
    native.export(ours, lm, sae, [Clamp(3, 2.0, 6.0)])
    (tmp_path / "y.json").write_text(json.dumps({**json.loads(ours.read_text()), "layer_base": 1}))
    for path, to, given, error, message in (
        ("x.gguf", other, {}, ModelError, "was made for lab of config .* tiny-Qwen2 here has config"),
        ("there.pt", other, {}, ModelError, r"has vectors \[128\], tiny-Qwen2 has width 32"),
        ("x.gguf", lm, {"layer": 2}, ConfigError, "names its own layers"),
        ("x.gguf", lm, {"strength": float("nan")}, ConfigError, "finite"),
        ("x.json", other, {}, ModelError, "is for width 128, tiny-Qwen2 has 32"),
        ("y.json", lm, {}, FormatError, "counts layers from 1"),
        ("vectors.pt", lm, {"layer": 2}, ConfigError, "a finite vector .* that is not 0"),
        ("vectors.pt", lm, {}, ConfigError, "give --layer, 0 to 4, got None"),
        ("vectors.pt", lm, {"layer": 5}, ConfigError, "give --layer, 0 to 4, got 5"),
        ("tall.pt", lm, {"layer": 2}, ModelError, r"holds \[9, 128\], persona vectors of lab are \[6, 128\]"),
        ("nan.pt", lm, {"layer": 2}, FormatError, "NaN"),
        ("words.pt", lm, {}, FormatError, "is not an lm-eval steered file"),
        ("there.pt", lm, {}, ModelError, "edits lm_head, which is no block of lab"),
        ("x.onnx", lm, {}, FormatError, "ends in no kind that is read"),
        ("gone.json", lm, {}, FormatError, "no intervention file at"),
    ):
        with pytest.raises(error, match=message):
            import_intervention(tmp_path / path, to, **given)
    handle.remove()
    assert not ran


def test_lm_eval_files_are_read_with_their_strength(lm, one_sum, edited, tmp_path):
    path = lm_eval_file.write(one_sum, lm, tmp_path / "x.pt")
    whole = import_intervention(path, lm).edits[0].edit
    half = import_intervention(path, lm, strength=0.5).edits[0].edit
    assert isinstance(whole, Steer) and half.strength == whole.strength / 2


JUNK = [
    None,
    True,
    -1,
    99,
    1.5,
    10**400,
    math.nan,
    "",
    "a/b",
    "\0",
    "..",
    "layers.2.resid_post",
    [],
    [[]],
    {},
    {"a": 1},
]


def places(value, at=()):
    """The keys that lead to every part of a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*at, key)
        yield from places(part, (*at, key))


def changed(raw, place, junk, *, drop=False):
    """A copy with another value there, or without it."""
    copy = json.loads(json.dumps(raw))
    owner = copy
    for key in place[:-1]:
        owner = owner[key]
    if drop:
        del owner[place[-1]]
    else:
        owner[place[-1]] = junk
    return copy


def opens_or_refuses(path, lm, **given):
    """Whether it could be applied; anything but a refusal of ours fails the test."""
    try:
        with import_intervention(path, lm, **given).applied(lm):
            return True
    except SaePersonaError as error:
        assert "\n" not in str(error) and "Error(" not in str(error)
        return False


@pytest.mark.filterwarnings("ignore::sae_persona.steering.rows.EditsMeet")
def test_crafted_files_of_ours_are_refused_in_one_line(lm, sae, tmp_path):
    waits = When(latent=5, above=0.1, scope="turn", hook=HookPoint(2))
    points = When(direction=torch.ones(lm.d_model), above=1.0)
    edits = [
        Placed(edit=Clamp(3, 2.0, 6.0), priority=1, when=waits),
        Placed(edit=ProjectOut(torch.eye(lm.d_model)[:2]), hook=HookPoint(3), when=points),
    ]
    path = native.export(tmp_path / "x.json", lm, sae, edits)
    raw = json.loads(path.read_text())
    assert opens_or_refuses(path, lm)
    wanted = [place for place in places(raw) if place[0] not in ("evidence", "versions", "unit")]
    assert len(wanted) > 50
    for place in wanted:
        broken = [changed(raw, place, None, drop=True), *(changed(raw, place, junk) for junk in JUNK)]
        for one in broken:
            path.write_text(json.dumps(one))
            opens_or_refuses(path, lm)
    for text in ("[" * 100_000, "9" * 5000, "[]", "null", "", "\ud800", '{"format": 2}'):
        path.write_text(text, errors="surrogatepass")
        assert not opens_or_refuses(path, lm)


def test_crafted_tensors_of_torch_are_refused_in_one_line(lm, tmp_path):
    path, v = tmp_path / "x.pt", torch.ones(lm.d_model)
    entry = {"action": "add", "steering_vector": v, "steering_coefficient": 1.0, "bias": None}
    odd = [
        v.to_sparse(),
        v.to(torch.complex64),
        v[:0],
        v[:3],
        v * math.nan,
        v * 0,
        v.double() * 1e300,
        v[None],
        3,
        "x",
        None,
        [],
    ]
    entries = [{**entry, key: junk} for key in entry for junk in [*odd, *JUNK]]
    entries += [{**entry, "action": "clamp", "steering_vector": x} for x in odd]
    entries += [{**entry, "action": "clamp", "bias": x} for x in odd]
    contents = [
        *({"layers.2": one} for one in entries),
        *odd,
        {},
        {3: entry},
        {"layers.2": 3},
        {"a": entry},
        torch.zeros(2, 2),
    ]
    contents += [torch.ones(lm.n_layers, lm.d_model).to_sparse(), torch.ones(lm.n_layers, lm.d_model) * math.inf]
    for content in contents:
        torch.save(content, path)
        for given in ({}, {"layer": 2}):
            opens_or_refuses(path, lm, **given)
    torch.save({"layers.2": entry}, path)
    assert opens_or_refuses(path, lm)
    _broken_bytes(path, lm)


def test_crafted_control_vectors_are_refused_in_one_line(lm, sums, tmp_path):
    _broken_bytes(control_vector.write(sums, lm, tmp_path / "x.gguf"), lm)


def _broken_bytes(path, lm):
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        cut = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.randrange(4)):
            if cut:
                cut[draw.randrange(min(600, len(cut)))] = draw.randrange(256)
        path.write_bytes(cut)
        opens_or_refuses(path, lm)


def test_a_control_vector_knows_its_model(lm, sums, tmp_path):
    path = control_vector.write(sums, lm, tmp_path / "x.gguf")
    assert control_vector.made_for(path, lm.d_model).name == lm.name
    other = LM(lm.model, lm.tokenizer, lm.blocks, lm.blocks_path, "other")
    other.__dict__["config_hash"] = "0" * 64
    with pytest.raises(ModelError, match="was made for lab of config .*, and other here has config 00000000"):
        import_intervention(path, other)
