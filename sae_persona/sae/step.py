"""What a training step is, however it is computed: `plain_step.py` in plain torch on any device, `kernel_step.py`
through the Triton kernels on a GPU.

The gradients of the main loss are written out: every dense one would be n_latents wide. Of a batch x [n, d_in] that is
already centred and scaled, with M prefixes of the dictionary (one, the whole, unless it is nested):

error_m = sum of act * w_dec[latent] over the latents below prefix m, + b_dec - x
loss = mean over m of mean over tokens of |error_m|^2 + auxk_coef * AuxK + sparsity        Matryoshka: 2503.17547

d_error_m = 2 error_m / n        pull[l] = sum of d_error_m over the prefixes that hold latent l, / M
d_act = pull[latent][token] . w_dec[latent]      d_pre = d_act where the latent fires, 0 elsewhere
d_w_dec[l] = sum of act * pull[l][token]         over the entries (token, latent, act) of latent l
d_w_enc[l] = sum of d_pre * x[token]             over the same
d_b_dec = sum over tokens of pull[0]

Multi-TopK has two reconstructions in place of prefixes, of the k and of the 4 k largest of a token: `nested.py`.

JumpReLU (2407.14435) trains its thresholds too, by straight-through estimates; `JumpReLU` in `sparsity.py` has the
formulas. Afterwards decoder gradients lose their part along the rows, which keep norm 1; all gradients together are
clipped to a norm, where one is given; Adam takes the step.

Where the dictionary is shared by ranks (`shard.py`) the sums over latents are taken over all of them, each on its own
before the ranks' are added up, and so are the norm of all gradients, the count of what fires and that of the dead.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Weights(NamedTuple):
    """What is trained; shapes as in SAE."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor


def threshold_lr(lr: float, d_in: int) -> float:
    """Learning rate of JumpReLU's thresholds: what ``lr`` is where activations are scaled to norm 1, as published.

    Here their norm is sqrt(d_in), and thresholds are as long. With ``lr`` itself they do not keep up with the encoder,
    which moves a pre-activation by up to lr * d_in a step: on 128-wide planted data L0 was 10 of 16 after 800 steps.
    """
    return lr * math.sqrt(d_in)


class Measured(Protocol):
    """What a step saw."""

    def measures(self) -> dict[str, float]:
        """The loss, its shares, FVU and L0."""
        ...


class Step(Protocol):
    """A training step: called with x [n, d_in] and a learning rate, it moves the weights."""

    def __call__(self, x: Tensor, lr: float) -> Measured: ...

    def set_k(self, k: int) -> None:
        """From the next call on, keep ``k`` latents a token, or aim at them: for a k that is annealed."""
        ...

    @property
    def weights(self) -> Weights: ...

    @property
    def threshold(self) -> Tensor | None:
        """[n_latents], JumpReLU's; None for the other rules."""
        ...

    @property
    def dead(self) -> Tensor:
        """[n_latents] bool."""
        ...

    @property
    def flagged(self) -> int:
        """Steps that changed nothing, since their loss was not finite."""
        ...


@dataclass(frozen=True)
class Seen:
    """What a step saw, on all ranks. Measures are computed when they are asked for, since few steps are looked at.

    x         [n, d_in]          centred and scaled
    d_error   [n, d_in]          (reconstruction - x) * 2 / n, of the whole dictionary; with multi-TopK of the k largest
    fires     []                 latents that fire, over all tokens
    auxk      []                 the weighted AuxK loss
    sparsity  []                 the weighted sparsity loss; None for a rule that has none
    nested    []                 squared error a token, as the prefixes or multi-TopK weigh it; None: of one alone
    """

    x: Tensor
    d_error: Tensor
    fires: Tensor
    auxk: Tensor
    sparsity: Tensor | None = None
    nested: Tensor | None = None

    def measures(self) -> dict[str, float]:
        """The loss, the shares of AuxK and of sparsity in it, FVU, and L0: latents that fire on a token.

        FVU and L0 are those of the whole dictionary. No sparsity for a rule without that loss.
        """
        n = len(self.x)
        squares = self.d_error.square().sum().item() * n * n / 4
        variance = (self.x - self.x.mean(dim=0)).square().sum().item()
        shares = {"auxk": self.auxk.item()}
        if self.sparsity is not None:
            shares["sparsity"] = self.sparsity.item()
        main = squares / n if self.nested is None else self.nested.item()
        return {"loss": main + sum(shares.values()), **shares, "fvu": squares / variance, "l0": self.fires.item() / n}
