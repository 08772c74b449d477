"""The written-out gradients against autograd on the dense formulas, in fp64."""

import pytest
import torch
from torch import Tensor

from sae_persona.sae.sparsity import BatchTopK, TopK
from sae_persona.sae.step import Step, Weights

N, D_IN, N_LATENTS, K = 24, 10, 60, 4
# with 40 of 60 latents, some of a token's k are below 0
RULES = {"topk": TopK(K), "topk cut by the relu": TopK(40), "batch_topk": BatchTopK(K)}


def weights(seed=0) -> Weights:
    g = torch.Generator().manual_seed(seed)
    shapes = ((N_LATENTS, D_IN), (N_LATENTS,), (N_LATENTS, D_IN), (D_IN,))
    w_enc, b_enc, w_dec, b_dec = (torch.randn(*s, dtype=torch.float64, generator=g) for s in shapes)
    return Weights(w_enc, b_enc, torch.nn.functional.normalize(w_dec, dim=1), b_dec)


def batch(seed=1) -> Tensor:
    return torch.randn(N, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(rule, *, n_dead=0, k_aux=None, auxk_coef=1 / 4) -> Step:
    step = Step(weights(), rule, k_aux=k_aux, auxk_coef=auxk_coef, dead_after=100)
    step.silent[:n_dead] = 100
    return step


def formula(w: Weights, x: Tensor, rule, dead: Tensor, k_aux: int, auxk_coef: float) -> Tensor:
    """The whole loss, dense and by the book."""
    pre = x @ w.w_enc.T + w.b_enc
    acts = pre * (rule.select(pre.detach()).dense(N_LATENTS) > 0)
    error = x - (acts @ w.w_dec + w.b_dec)
    loss = error.square().sum(dim=1).mean()
    if len(dead) == 0:
        return loss
    top = pre[:, dead].topk(min(k_aux, len(dead)), dim=1)
    rebuilt = (top.values.relu()[:, :, None] * w.w_dec[dead][top.indices]).sum(dim=1)
    share = min(1, len(dead) / k_aux)
    return loss + auxk_coef * share * (error.detach() - rebuilt).square().sum(dim=1).mean()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("n_dead", "k_aux"), [(0, 5), (3, 5), (20, 5), (20, 30)])
def test_gradients_are_those_of_the_dense_formula(rule, n_dead, k_aux):
    x, step = batch(), make(rule, n_dead=n_dead, k_aux=k_aux)
    measures = step.gradients(x).measures()
    wanted = Weights(*(w.clone().requires_grad_() for w in step.weights))
    loss = formula(wanted, x, rule, torch.arange(n_dead), k_aux, 1 / 4)
    loss.backward()
    assert measures["loss"] == pytest.approx(loss.item())
    # gradients of the decoder lose their part along the rows
    along = (wanted.w_dec.grad * wanted.w_dec).sum(dim=1, keepdim=True)
    wanted.w_dec.grad -= (along * wanted.w_dec).detach()
    for name, got, want in zip(Weights._fields, step.weights, wanted, strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_auxk_reaches_encoder_and_decoder_of_dead_latents_and_nothing_else(rule):
    x, without, with_auxk = batch(), make(rule, n_dead=20, auxk_coef=0), make(rule, n_dead=20)
    without.gradients(x)
    with_auxk.gradients(x)
    differs = {
        name: (a.grad != b.grad).view(len(a), -1).any(dim=1)
        for name, a, b in zip(Weights._fields, without.weights, with_auxk.weights, strict=True)
    }
    for name in ("w_enc", "b_enc", "w_dec"):
        assert differs[name][:20].all() and not differs[name][20:].any(), name
    assert not differs["b_dec"].any()


def test_measures_are_of_the_batch():
    x, step = batch() + 2, make(TopK(K), auxk_coef=0)
    measures = step.gradients(x).measures()
    w = step.weights
    acts = TopK(K).select(x @ w.w_enc.T + w.b_enc).dense(N_LATENTS)
    error = x - acts @ w.w_dec - w.b_dec
    assert measures["fvu"] == pytest.approx((error.square().sum() / (x - x.mean(dim=0)).square().sum()).item())
    assert measures["l0"] == (acts > 0).sum(dim=1).double().mean().item()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_step_lowers_the_loss_and_keeps_rows_at_norm_1(rule):
    x, step = batch(), make(rule, auxk_coef=0)
    losses = [step(x, 1e-3).measures()["loss"] for _ in range(20)]
    assert losses[-1] < losses[0]
    norms = step.weights.w_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_latents_that_do_not_fire_die_and_those_that_do_come_back():
    step, x = make(TopK(N_LATENTS)), batch()  # which chooses all of them: to fire is to be above 0
    step.weights.b_enc[0], step.weights.b_enc[1] = -1e3, 1e3
    step.silent[1] = 99
    for _ in range(5):
        step.gradients(x)
    assert step.dead[0] and not step.dead[1]
    assert step.silent[0] == 5 * N and step.silent[1] == 0


def test_a_smaller_batch_after_a_larger_one_reads_no_stale_row():
    x, step, fresh = batch(), make(TopK(K)), make(TopK(K))
    step.gradients(x)
    assert step.gradients(x[:7]).measures() == fresh.gradients(x[:7]).measures()
