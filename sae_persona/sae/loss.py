"""The two losses of an SAE, and the measure that is reported."""

from torch import Tensor

from sae_persona.sae.shard import ALONE, Shard


def fvu(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Fraction of variance unexplained: squared error over squared distance from the batch mean. [n, d_in] both."""
    return (x - reconstruction).square().sum() / (x - x.mean(dim=0)).square().sum()


def auxk_loss(
    error: Tensor, pre_acts: Tensor, w_dec: Tensor, k_aux: int, *, shard: Shard = ALONE, width: int | None = None
) -> Tensor:
    """How far the dead latents are from explaining what the living ones left over: AuxK, 2406.04093 A.2.

    error      [n, d_in]        x - reconstruction, without gradient. b_dec is in it, so it is not added again
    pre_acts   [n, n_dead]      of the dead latents, with gradient
    w_dec      [n_dead, d_in]   their decoder rows, with gradient
    width      largest n_dead of any rank; None: there is one rank

    The k_aux strongest dead latents of each token rebuild the error; squared distance, summed over d_in, mean over
    tokens. The dead of all ranks count, and each rank gets the gradients of its own. ValueError if pre_acts carry no
    gradient: a constant would train the decoder only, and nothing would show.
    """
    if not pre_acts.requires_grad:
        raise ValueError("auxk_loss needs pre_acts that carry a gradient: encode the dead latents with grad enabled")
    acts = pre_acts.relu()
    width = pre_acts.shape[1] if width is None else width
    if k_aux < width * shard.world:
        acts = acts * shard.among_largest(pre_acts.detach(), k_aux, width=width)
    return (shard.summed(acts @ w_dec) - error.detach()).square().sum(dim=1).mean()
