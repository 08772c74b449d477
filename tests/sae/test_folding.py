"""Whatever is folded, the SAE in fp32 answers on raw activations as the file's formula does in fp64."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_persona.sae.folding import RawSAE, gated
from sae_persona.sae.formats import load_sae, save_sae
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import ReLU, Threshold, TopK

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 30))  # d_in, n_latents
SEEDS, SCALES = st.integers(0, 2**31), st.floats(1e-3, 1e3)
EPS = torch.finfo(torch.float32).eps
fast = settings(deadline=None, max_examples=60)


def random_raw(sizes, seed: int, **more) -> RawSAE:
    d_in, n_latents = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n_latents, d_in), (n_latents,), (n_latents, d_in), (d_in,))
    w_enc, b_enc, w_dec, b_dec = (torch.randn(*shape, generator=generator) for shape in shapes)
    return RawSAE(w_enc, b_enc, w_dec, b_dec, **more)


def tokens(sizes, seed: int) -> Tensor:
    return 3 * torch.randn(20, sizes[0], generator=torch.Generator().manual_seed(seed + 1))


def pre_acts(raw: RawSAE, z: Tensor) -> Tensor:
    return z.double() @ raw.w_enc.double().T + raw.b_enc.double()


def decode(raw: RawSAE, acts: Tensor) -> Tensor:
    return acts @ raw.w_dec.double() + raw.b_dec.double()


def check(sae: SAE, x: Tensor, wanted_pre: Tensor, norms: Tensor, rebuild) -> None:
    """Pre-activations are ``wanted_pre * norms``, and `rebuild` of unscaled activations is what ours decode to.

    Each error is bounded by fp32 rounding of the terms that are summed.
    """
    terms = x.abs().double() @ sae.w_enc.abs().double().T + sae.b_enc.abs()
    bound = 2 * EPS * (x.shape[1] + 4) * terms
    assert ((sae.pre_acts(x) - wanted_pre * norms).abs() <= bound).all()
    latents = sae.encode(x)
    acts = latents.dense(sae.n_latents).double()
    terms = acts @ sae.w_dec.abs().double() + sae.b_dec.abs()
    error = (sae.decode(latents) - rebuild(acts / norms)).abs()
    assert (error <= 2 * EPS * (sae.n_latents + 4) * terms + 1e-30).all()


@fast
@given(SIZES, SEEDS)
def test_a_centred_sae_reads_raw_activations(sizes, seed):
    raw, x = random_raw(sizes, seed), tokens(sizes, seed)
    norms = raw.w_dec.double().norm(dim=1)
    wanted = pre_acts(raw, x.double() - raw.b_dec.double())
    check(raw.centred().finished({}), x, wanted, norms, lambda acts: decode(raw, acts))


@fast
@given(SIZES, SEEDS, SCALES)
def test_a_scale_of_the_input_is_folded(sizes, seed, scale):
    raw, x = random_raw(sizes, seed), tokens(sizes, seed)
    norms = raw.w_dec.double().norm(dim=1) / scale
    sae = raw.scaled(scale).finished({})
    check(sae, x, pre_acts(raw, x.double() * scale), norms, lambda acts: decode(raw, acts) / scale)
    both = raw.centred().scaled(scale).finished({})
    wanted = pre_acts(raw, x.double() * scale - raw.b_dec.double())
    check(both, x, wanted, norms, lambda acts: decode(raw, acts) / scale)


@fast
@given(SIZES, SEEDS, SCALES)
def test_a_whitening_and_a_scale_before_it_are_folded(sizes, seed, scale):
    raw, x, d_in = random_raw(sizes, seed), tokens(sizes, seed), sizes[0]
    generator = torch.Generator().manual_seed(seed + 2)
    mean = torch.randn(d_in, generator=generator).double()
    matrix = torch.randn(d_in, d_in, generator=generator).double() + 3 * d_in * torch.eye(d_in)  # far from singular
    inverse = matrix.inverse()
    sae = raw.whitened(mean, matrix, inverse).scaled(scale).finished({})
    norms = (raw.w_dec.double() @ inverse).norm(dim=1) / scale

    def rebuild(acts: Tensor) -> Tensor:
        return (decode(raw, acts) @ inverse + mean) / scale

    check(sae, x, pre_acts(raw, (x.double() * scale - mean) @ matrix), norms, rebuild)


@fast
@given(SIZES, SEEDS, SCALES)
def test_thresholds_are_scaled_with_their_pre_activations(sizes, seed, scale):
    threshold = torch.randn(sizes[1], generator=torch.Generator().manual_seed(seed + 3))
    raw = random_raw(sizes, seed, threshold=threshold)
    rule = raw.scaled(scale).finished({}).rule
    assert isinstance(rule, Threshold)
    wanted = threshold.double() * raw.w_dec.double().norm(dim=1) / scale
    torch.testing.assert_close(rule.threshold, wanted.float(), rtol=EPS, atol=0)


@fast
@given(SIZES, SEEDS)
def test_a_gated_sae_is_a_jumprelu_one(sizes, seed):
    raw, x, n = random_raw(sizes, seed), tokens(sizes, seed), sizes[1]
    b_gate, b_mag, r_mag = torch.randn(3, n, generator=torch.Generator().manual_seed(seed + 4))
    sae = gated(raw.w_enc, b_gate, b_mag, r_mag, raw.w_dec, raw.b_dec).finished({})
    within = x.double() @ raw.w_enc.double().T
    gate, magnitude = within + b_gate, within * r_mag.double().exp() + b_mag
    norms = raw.w_dec.double().norm(dim=1)
    wanted = ((gate > 0) * magnitude.relu() * norms).float()
    clear = (gate.abs() > 1e-4) & (magnitude.abs() > 1e-4)  # of being closed or open by rounding
    found = sae.encode(x).dense(n)
    torch.testing.assert_close(found[clear], wanted[clear], rtol=1e-4, atol=1e-4)
    assert ((found > 0) == (wanted > 0))[clear].all()


@fast
@given(SIZES, SEEDS, SCALES, st.sampled_from(["relu", "topk", "threshold"]))
def test_what_was_folded_is_saved_and_loaded_to_the_bit(sizes, seed, scale, rule):
    more = {"topk": {"k": 1}, "threshold": {"threshold": torch.linspace(-1, 1, sizes[1])}}.get(rule, {})
    sae, x = random_raw(sizes, seed, **more).centred().scaled(scale).finished({}), tokens(sizes, seed)
    with TemporaryDirectory() as folder:
        save_sae(sae, Path(folder, "sae"))
        again = load_sae(Path(folder, "sae"))
    assert again.fingerprint == sae.fingerprint and again.predict(x).equal(sae.predict(x))


def test_rows_of_norm_1_within_rounding_stay_to_the_bit():
    raw = random_raw((700, 40), 0)
    raw = replace(raw, w_dec=torch.nn.functional.normalize(raw.w_dec, dim=1))
    sae = raw.finished({})
    assert (raw.w_dec.norm(dim=1) != 1).any()
    assert sae.w_dec.equal(raw.w_dec) and sae.w_enc.equal(raw.w_enc) and sae.b_enc.equal(raw.b_enc)
    off = replace(raw, w_dec=raw.w_dec * (1 + 3e-6)).finished({})
    torch.testing.assert_close(off.w_dec.norm(dim=1), torch.ones(40), rtol=0, atol=5e-7)
    assert not off.w_enc.equal(raw.w_enc)


def test_under_topk_rows_of_different_norms_keep_them():
    raw = random_raw((8, 40), 0, k=3)
    sae = raw.finished({})
    assert sae.rule == TopK(3) and sae.w_dec.equal(raw.w_dec)
    alike = replace(raw, w_dec=5 * torch.nn.functional.normalize(raw.w_dec, dim=1)).finished({})
    torch.testing.assert_close(alike.w_dec.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(alike.w_enc, 5 * raw.w_enc)


def test_a_row_of_zeros_stays_one():
    raw = random_raw((8, 5), 0)
    raw.w_dec[2] = 0
    sae = raw.finished({})
    assert isinstance(sae.rule, ReLU) and sae.w_dec.isfinite().all() and not sae.w_dec[2].any()
