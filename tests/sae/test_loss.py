import pytest
import torch

from sae_persona.sae.loss import auxk_loss, fvu


def test_fvu_is_0_for_a_perfect_reconstruction_and_1_for_the_mean():
    x = torch.randn(50, 4) + 3
    assert fvu(x, x) == 0
    torch.testing.assert_close(fvu(x, x.mean(dim=0).expand_as(x)), torch.tensor(1.0))


def test_auxk_by_hand():
    error = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    pre = torch.tensor([[0.5, 3.0, 0.1], [-1.0, -2.0, -3.0]], requires_grad=True)
    w_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    # the first token's two strongest rebuild (0.5, 3), the second has none above 0
    assert auxk_loss(error, pre, w_dec, k_aux=2).item() == pytest.approx(((0.5**2 + 3**2) + 2**2) / 2)


def test_auxk_trains_the_dead_not_what_left_the_error():
    error, pre = torch.randn(2, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    w_dec = torch.randn(4, 3, requires_grad=True)
    auxk_loss(error, pre, w_dec, 2).backward()
    assert error.grad is None and pre.grad.any() and w_dec.grad.any()


def test_auxk_refuses_pre_acts_without_a_gradient():
    with pytest.raises(ValueError, match="needs pre_acts that carry a gradient"):
        auxk_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(4, 3), 2)
