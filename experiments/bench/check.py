"""Whether what is timed is a training step: small ones beside `PlainStep`, and the loss of any shape in plain torch."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from experiments.bench import modes, peers

SMALL = modes.Shape(256, 4096, k=16, n=512)
STEPS, LR = 6, 3e-4
LOSS_OFF = 0.01  # bf16 chooses other latents than fp32 where they are nearly equal; fp8 is rescored
FP32_OFF = 1e-4


def loss_of(result: Any) -> float:
    """The loss of what a step returned."""
    return float(result) if isinstance(result, Tensor) else result.measures()["loss"]


def small_step(name: str) -> tuple[bool, str]:
    """Whether a mode or peer trains as `PlainStep` does at a small shape, with the numbers that say so."""
    # AuxK of all tokens, as in the reference
    mode, shape = replace(modes.EVERY.get(name, modes.Mode()), auxk_tokens=1.0), SMALL
    dictionary, batches = modes.data(shape)
    plain = modes.plain_step(mode, shape, modes.fresh(dictionary, dead=mode.dead), batches[0].float())
    if name == "plain_dense":
        step: Any = peers.PlainDense(modes.fresh(dictionary), shape.k)
    elif name == "sae_lens":
        sae_lens = peers.saelens(modes.fresh(dictionary), shape.k, lr=LR, bf16=True)[1]
        step = lambda x, _: sae_lens(x)  # noqa: E731
    else:
        step = modes.kernel_step(mode, shape, modes.fresh(dictionary, dead=mode.dead), batches[0])

    if mode.dead:  # both do without AuxK until the kernels know of the dead
        coef, plain.auxk_coef = plain.auxk_coef, 0.0
        for _ in range(modes.until_dead_are_known()):
            plain(batches[0].float(), 0.0), step(batches[0], 0.0)
        plain.auxk_coef = coef
    exact = mode.precision == "fp32"
    worst = 0.0
    for i in range(STEPS):
        x = batches[i % len(batches)]
        want, got = loss_of(plain(x.float(), LR)), loss_of(step(x, LR))
        # SAELens neither projects nor renormalises, so its later losses are others
        if i == 0 or name != "sae_lens":
            off = abs(got - want) / want if math.isfinite(got) else math.inf
            worst = max(worst, off)
    good = worst <= (FP32_OFF if exact else LOSS_OFF)
    text = f"loss {got:.4f} for {want:.4f}, at most {worst:.1e} apart"
    if name == "sae_lens":
        return good, text

    rows, moved = _agreement(step.weights.w_dec.detach(), plain.weights.w_dec, dictionary)
    _, moved_enc = _agreement(
        step.weights.w_enc.detach(), plain.weights.w_enc, modes.fresh(dictionary, dead=mode.dead)[0]
    )
    least = 0.999 if exact else 0.9  # Adam makes a full step of a gradient that is almost 0, whichever its sign
    finite = all(bool(w.isfinite().all()) for w in step.weights)
    text += f"; decoder rows' least cosine {rows:.6f}; way gone: decoder {moved:.4f}, encoder {moved_enc:.4f}"
    return good and finite and min(moved, moved_enc) >= least, text + ("" if finite else "; NOT FINITE")


def _agreement(got: Tensor, want: Tensor, start: Tensor) -> tuple[float, float]:
    """The least cosine between rows of two weights, and the cosine between the ways they went from the start."""
    rows = torch.cosine_similarity(got, want, dim=1).min().item()
    way = torch.cosine_similarity((got - start).flatten(), (want - start).flatten(), dim=0).item()
    return rows, way


def topk_loss(dictionary: Tensor, x: Tensor, k: int) -> float:
    """Mean squared error a token when the k latents that plain fp32 torch finds rebuild x, all tokens of it."""
    total, rows = 0.0, max(16, min(1024, 2**27 // len(dictionary), 2**27 // (k * x.shape[1])))
    for part in x.split(rows):
        part = part.float()
        values, idx = (part @ dictionary.T).topk(k, dim=1)
        rebuilt = (values.relu()[:, :, None] * dictionary[idx]).sum(dim=1)
        total += (rebuilt - part).square().sum().item()
    return total / len(x)
