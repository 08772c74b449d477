import pytest
import torch

from sae_persona.errors import ConfigError, ModelError
from sae_persona.sae.model import SAE
from sae_persona.steering.interventions import (
    Ablate,
    Add,
    Clamp,
    Scale,
    Steer,
    parse_edit,
    placed,
)
from sae_persona.steering.positions import check_positions
from sae_persona.steering.rows import Rows
from sae_persona.types import SparseLatents


def edited(sae, edits, x):
    return rows_of(sae, edits, x.shape[1]).moved(x)


def rows_of(sae, edits, d_in=None):
    return Rows.of(placed(edits, hook=None, positions="all"), sae, d_in or sae.d_in)


@pytest.fixture
def x(lm):
    return torch.randn(12, lm.d_model, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["sae", "topk_sae"])
def any_sae(request):
    return request.getfixturevalue(request.param)


def firing(sae, x):
    """A latent that fires on some rows and not on all."""
    dense = sae.encode(x).dense(sae.n_latents) > 0
    return int(((dense.any(0)) & (~dense.all(0))).nonzero()[0])


def test_clamping_is_decoding_with_the_latent_set_and_the_error_kept(any_sae, x):
    latent = firing(any_sae, x)
    dense = any_sae.encode(x).dense(any_sae.n_latents)
    idx = torch.arange(any_sae.n_latents).expand(len(x), -1)
    error = x - any_sae.decode(SparseLatents(dense, idx))
    dense[:, latent] = 3.0
    wanted = any_sae.decode(SparseLatents(dense, idx)) + error
    got = edited(any_sae, (Clamp(latent, 2.0, 1.5),), x)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_order_does_not_matter(sae, x):
    edits = (Clamp(3, 1.0, 4.0), Add(7, 0.5, 2.0), Scale(9, 3.0), Ablate(11))
    torch.testing.assert_close(edited(sae, edits, x), edited(sae, edits[::-1], x))


def test_what_changes_nothing_is_bit_identical(any_sae, x):
    latent = firing(any_sae, x)
    for edits in ((Add(latent, 0.0, 5.0),), (Scale(latent, 1.0),)):
        assert torch.equal(edited(any_sae, edits, x), x)
    assert torch.equal(edited(None, [Steer(torch.ones(x.shape[1]), 0.0)], x), x)


def test_clamping_to_the_current_value_changes_nothing(sae, x):
    for row in x.split(1):
        value = sae.latents_at(row, torch.tensor([5])).item()
        assert torch.equal(edited(sae, (Clamp(5, value, 1.0),), row), row)


def test_ablating_is_clamping_to_zero_and_leaves_silent_rows_alone(any_sae, x):
    latent = firing(any_sae, x)
    got = edited(any_sae, (Ablate(latent),), x)
    torch.testing.assert_close(got, edited(any_sae, (Clamp(latent, 0.0, 7.0),), x))
    silent = any_sae.latents_at(x, torch.tensor([latent]))[:, 0] == 0
    assert torch.equal(got[silent], x[silent])
    assert not torch.equal(got[~silent], x[~silent])


def test_scale_and_add_do_what_they_say(sae, x):
    acts, direction = sae.latents_at(x, torch.tensor([5])), sae.directions(torch.tensor([5]))
    torch.testing.assert_close(edited(sae, (Scale(5, 3.0),), x), x + 2 * acts * direction)
    torch.testing.assert_close(edited(sae, (Add(5, 0.5, 3.0),), x), x + 1.5 * direction)
    vector = torch.arange(float(x.shape[1]))
    torch.testing.assert_close(edited(None, [Steer(vector, 2.0)], x), x + 2 * vector)


def test_bf16_comes_back_as_bf16_with_the_edit_rounded_once(sae, x):
    low = x.bfloat16()
    got = edited(sae, (Add(5, 1.0, 3.0),), low)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (low.float() + 3.0 * sae.w_dec[5]).bfloat16())


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ((Ablate(40),), "latent 40 does not exist: this SAE has latents 0 to 39"),
        ((Ablate(-1),), "latent -1 does not exist"),
        ((Ablate(2), Scale(2, 2.0)), "latent 2 is edited twice"),
    ],
)
def test_edits_that_cannot_be_are_refused(sae, edits, message):
    with pytest.raises(ConfigError, match=message):
        rows_of(sae, edits)


def test_edits_are_read_from_text():
    units = [1.0, 2.5]
    assert parse_edit("clamp:1=2", units) == Clamp(1, 2.0, 2.5)
    assert parse_edit("add:0=-0.5", units) == Add(0, -0.5, 1.0)
    assert parse_edit("scale:1=0", units) == Scale(1, 0.0)
    assert parse_edit("ablate:1", units) == Ablate(1)


@pytest.mark.parametrize("text", ["clamp:1", "ablate:1=2", "set:1=2", "clamp:x=1", "1=2", "", "clamp:1=y"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match="an edit reads clamp:LATENT=STRENGTH"):
        parse_edit(text, [1.0, 2.0])


def test_positions_are_checked():
    check_positions("answer")
    with pytest.raises(
        ConfigError, match="positions is one of answer, pre, generated, prompt, all, every or spans .*, got 'end'"
    ):
        check_positions("end")


@pytest.mark.parametrize("amount", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(amount):
    for make in (lambda: Clamp(3, amount, 1.0), lambda: Add(3, 1.0, amount), lambda: Scale(3, amount)):
        with pytest.raises(ConfigError, match="an edit of latent 3 needs finite numbers"):
            make()
    with pytest.raises(ConfigError, match="a latent that never fired has no percentile"):
        parse_edit("clamp:1=2", [1.0, float("nan")])


def test_a_transcoder_has_no_latents_to_edit(sae):
    other = SAE(sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec, sae.rule, transcodes=True)
    with pytest.raises(ModelError, match="is a transcoder"):
        rows_of(other, (Ablate(0),))
