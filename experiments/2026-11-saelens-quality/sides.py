"""Both sides of the comparison: ours and SAELens train on the very same batches, and come back as the same class.

SAELens runs its own `SAETrainer` over a list of batches that is in memory. What is not its default follows its guide
to training: normalisation expected_average_only_in, the learning rate falling to 0 over the last fifth, and for
JumpReLU the tanh recipe that it recommends. Its window for dead latents is ours in tokens: its default of 1000 steps
is longer than these runs, in which its AuxK loss would never act.
"""

import io
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from sae_persona.sae.formats import load_sae
from sae_persona.sae.loss import fvu
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import Threshold
from sae_persona.sae.train import RuleName, TrainConfig, train

Side = Literal["ours", "sae_lens"]
SIDES: tuple[Side, ...] = ("ours", "sae_lens")
RULES: tuple[RuleName, ...] = ("topk", "batch_topk", "jumprelu")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One SAE to train. ``l0_coef`` is the weight of SAELens' tanh loss, for its JumpReLU alone."""

    rule: RuleName
    n_latents: int
    k: int
    lr: float
    seed: int
    l0_coef: float | None = None


def trained(side: Side, batches: Sequence[Tensor], spec: Spec) -> tuple[SAE, float]:
    """The SAE that a side exports after one pass over the batches [n, d_in], and the seconds it took."""
    start = time.perf_counter()
    sae = _ours(batches, spec) if side == "ours" else _saelens(batches, spec)
    return sae, time.perf_counter() - start


def _ours(batches: Sequence[Tensor], spec: Spec) -> SAE:
    """Every setting of training its default, but for the learning rate."""
    config = TrainConfig(
        n_latents=spec.n_latents, k=spec.k, rule=spec.rule, lr=spec.lr, steps=len(batches), seed=spec.seed
    )
    return train(batches, config, progress=False)


def _saelens(batches: Sequence[Tensor], spec: Spec) -> SAE:
    # here, since the import takes seconds
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    n = len(batches[0])
    torch.manual_seed(spec.seed)
    config = SAETrainerConfig(
        total_training_samples=n * len(batches),
        train_batch_size_samples=n,
        lr=spec.lr,
        lr_end=spec.lr,
        lr_decay_steps=len(batches) // 5,
        dead_feature_window=TrainConfig.dead_after // n,
        n_batches_for_norm_estimate=len(batches),
    )
    sae = _training_sae(spec, d_in=batches[0].shape[1], steps=len(batches))
    # the batches come twice, as they are read once for their mean norm
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=chain(batches, batches))
    with redirect_stderr(io.StringIO()):
        trainer.fit()
    with TemporaryDirectory() as folder:
        sae.save_inference_model(Path(folder))
        return load_sae(folder)


def _training_sae(spec: Spec, *, d_in: int, steps: int) -> Any:
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    shape: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": spec.n_latents,
        "normalize_activations": "expected_average_only_in",
    }
    if spec.rule == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=spec.k))
    if spec.rule == "batch_topk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, k=spec.k))
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            **shape,
            l0_coefficient=spec.l0_coef,
            l0_warm_up_steps=steps,
            jumprelu_sparsity_loss_mode="tanh",
            jumprelu_bandwidth=2.0,
            jumprelu_init_threshold=0.1,
            pre_act_loss_coefficient=3e-6,
        )
    )


@torch.no_grad()
def at_l0(sae: SAE, x: Tensor, k: int) -> SAE:
    """The SAE with all thresholds multiplied by one factor, so that k latents a token of x [n, d_in] fire on average.

    One without thresholds, so with TopK, is returned as it is.
    """
    if not isinstance(sae.rule, Threshold):
        return sae
    threshold = sae.rule.threshold.clamp(min=1e-12)
    # a latent fires with every factor below its ratio
    ratios = (sae.pre_acts(x) / threshold).flatten()
    factor = ratios.topk(len(x) * k).values.min()
    rule = Threshold(torch.nextafter(factor, factor.new_tensor(0.0)) * threshold)
    return SAE(sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec, rule, sae.metadata)


@torch.no_grad()
def l0(sae: SAE, x: Tensor) -> float:
    """Latents that fire on a token of x [n, d_in]."""
    return sae.encode(x).l0().double().mean().item()


@torch.no_grad()
def missed(sae: SAE, x: Tensor) -> float:
    """FVU on x [n, d_in]."""
    return fvu(x, sae.decode(sae.encode(x))).item()
